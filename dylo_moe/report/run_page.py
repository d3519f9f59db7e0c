"""One page about a run or a stream: what it learned, what it was made of. No network, no script."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import timedelta
from html import escape
from pathlib import Path

from dylo_moe.model.model_card import hardware_lines
from dylo_moe.report.charts import Series, colour_class, heatmap, legend, line_chart, mean
from dylo_moe.report.html import REPORT, cell, count, html_page, in_short, percent, side_by_side, table
from dylo_moe.report.run_record import Points, Record, finite, read_record
from dylo_moe.report.stream_page import stream_page
from dylo_moe.report.stream_record import is_stream, read_stream
from dylo_moe.utils.atomic_files import write_whole
from dylo_moe.utils.redact import open_settings, short_name, without_secrets

MAX_RAW_LINES = 400
"""Of metrics.jsonl, on the page."""


def write_report(folder: str, output: str | None = None) -> Path:
    """Write the page about the run or stream in `folder`; returns where it lies, by default report.html in there.

    Raises:
        ValueError: for a folder that is no run's and no stream's, or an output that is a folder.
    """
    target = Path(folder) / REPORT if output is None else Path(output)
    if target.is_dir():
        raise ValueError(f"output {target} is a folder; name a file, such as {target / REPORT}")
    text = stream_page(read_stream(Path(folder)), target.parent) if is_stream(Path(folder)) else run_page(Path(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text.encode("utf-8", errors="replace"))  # a text may hold half a surrogate pair
    return target


def run_page(folder: Path) -> str:
    """The whole page about a run."""
    record = read_record(folder)
    sections = [(identity, title, maker(record)) for identity, (title, maker) in SECTIONS.items()]
    return html_page(f"DyLoRA-MoE run {record.name}", sections)


def _summary(record: Record) -> str:
    facts, steps = record.facts, max((line["step"] for line in record.lines), default=0)
    planned = finite(record.settings.get("max_steps")) or -1
    of = f" of {planned:,.0f}" if planned > 0 else ""
    base = facts.get("base") or {}
    tiles = [
        ("state", "finished" if record.is_finished else "not finished"),
        ("base", short_name(without_secrets(str(base.get("id") or record.settings.get("model") or "not known")))),
        ("base parameters", in_short(base.get("parameters"))),
        ("experts", f"{len(record.experts):,}" if record.experts else "not known"),
        ("parameters trained", in_short(facts.get("trainable"))),
        ("datasets", f"{len(record.domains):,}" if record.domains else "not known"),
        ("optimizer steps", f"{steps:,}{of}"),
        ("epochs", f"{record.last('epoch') or 0:.3g}"),
        ("tokens per second", count(mean([value for _, value in record.points("tokens_per_second")]))),
        ("from first to last log", _duration(record)),
    ]
    boxes = "".join(f"<div><span>{name}</span><b>{escape(value)}</b></div>" for name, value in tiles)
    missing = "".join(f"<p class='alarm'>{escape(text)}</p>" for text in record.missing)
    return f"<div class='tiles'>{boxes}</div>{missing}{_losses_table(record)}"


def _losses_table(record: Record) -> str:
    rows = []
    for domain, points in record.losses.items():
        if not points:
            continue
        first, last = points[0][1], points[-1][1]
        change = "" if first is None or last is None else f"{last - first:+.4f}"
        kind = "" if not float(change or 0) else " good" if change.startswith("-") else " bad"
        best = min((value for _, value in points if value is not None), default=None)
        cells = [cell(short_name(domain)), *(cell(_loss(value), "n") for value in (first, last, best))]
        rows.append("".join([*cells, cell(change, f"n{kind}")]))
    if not rows:
        return "<p class='none'>No evaluation was logged.</p>"
    evaluated = [step for points in record.losses.values() for step, _ in points]
    note = f"Held-out loss in nats per token: of the first evaluation (step {min(evaluated):,}), the last (step "
    note += f"{max(evaluated):,}), and the lowest of all."
    return table(["dataset", "first", "last", "lowest", "change"], rows, {1, 2, 3, 4}) + f"<p class='note'>{note}</p>"


def _losses(record: Record) -> str:
    figures = []
    for index, domain in enumerate(record.domains):
        series = [
            Series("training", record.points(f"loss_{domain}"), index),
            Series("held out", record.losses[domain], index, dots=True),
        ]
        figures.append(line_chart(short_name(domain), series))
    whole = [Series("language model", record.points("lm_loss"), 0), Series("with all terms", record.points("loss"), 1)]
    figures.append(line_chart("all training tokens", whole))
    return side_by_side(
        figures, "Nats per token. Lines: means over the training tokens since the last log; dots: held out."
    )


def _benchmarks(record: Record) -> str:
    if not record.benchmarks:
        return "<p class='none'>No code benchmark was run while it trained.</p>"
    figures = []
    for index, name in enumerate(record.benchmarks):
        rates = Series("pass@1", record.points(f"eval_{name}_pass_at_1"), index, dots=True)
        tasks = record.last(f"eval_{name}_num_tasks")
        caption = "" if tasks is None else f"{tasks:,.0f} tasks, one greedy answer each."
        figures.append(line_chart(name, [rates], floor=0, caption=caption))
    return side_by_side(figures, "Share of the tasks whose tests an answer passes.")


def _shares(record: Record) -> str:
    figures = []
    for domain in record.domains:
        keys = [(expert, f"share_{domain}_{expert}") for expert in record.experts]
        if not any(record.points(key) for _, key in keys):
            keys = [(expert, f"eval_{domain}_share_{expert}") for expert in record.experts]
        steps = sorted({step for _, key in keys for step, _ in record.points(key)})
        known = [(expert, dict(record.points(key))) for expert, key in keys]
        rows: list[tuple[str, Points]] = [
            (expert, [(step, values.get(step)) for step in steps]) for expert, values in known
        ]
        figures.append(heatmap(short_name(domain), rows))
    note = (
        "Share of a dataset's tokens that went to each expert, over the steps: 0 % <span class='scale'></span> 100 %."
    )
    return f"<p class='note'>{note}</p>{side_by_side(figures)}{_final_shares(record)}"


def _final_shares(record: Record) -> str:
    rows = []
    for index, expert in enumerate(record.experts):
        cells = [f"<td class='who'><i class='key {colour_class(index)}'></i>{escape(expert)}</td>"]
        for domain in record.domains:
            share = record.last(f"eval_{domain}_share_{expert}")
            tint = f" style='--p:{round(50 * share)}%'" if share is not None else ""
            cells.append(f"<td class='n share'{tint}>{'' if share is None else f'{share:.1%}'}</td>")
        rows.append("".join(cells))
    if not any(record.points(f"eval_{domain}_loss") for domain in record.domains) or not rows:
        return ""
    titles = ["expert", *(short_name(domain) for domain in record.domains)]
    shares = table(titles, rows, set(range(1, len(titles))))
    return f"<p><b>The last evaluation</b>, share of the held-out tokens</p>{shares}"


def _entropy(record: Record) -> str:
    highest = math.log(max(len(record.experts), 1))
    marks = [(highest, f"log({len(record.experts)})")] if len(record.experts) > 1 else []
    training = [
        Series("of one token", record.points("token_entropy"), 0),
        Series("of the mean", record.points("average_entropy"), 1),
    ]
    figures = [line_chart("entropy in training", training, floor=0, marks=marks)]
    for key, title in (("token", "of one held-out token"), ("average", "of the mean over held-out tokens")):
        series = [
            Series(short_name(domain), record.points(f"eval_{domain}_{key}_entropy"), index)
            for index, domain in enumerate(record.domains)
        ]
        figures.append(line_chart(title, series, floor=0, marks=marks))
    return side_by_side(
        figures,
        "Nats. Of one token, low: the router is sure of each token. Of the mean, high: all experts are used; the "
        "dotted line is an even use of all.",
    )


def _load(record: Record) -> str:
    shares = [Series(expert, record.points(f"share_{expert}"), index) for index, expert in enumerate(record.experts)]
    even = [(1 / len(record.experts), "even")] if len(record.experts) > 1 else []
    imbalance = [Series("load imbalance", record.points("load_imbalance"), 0)]
    balance = [Series("balance loss", record.points("balance_loss"), 0)]
    figures = [
        line_chart("share of all training tokens", shares, floor=0, marks=even),
        line_chart("load imbalance", imbalance, floor=1, caption="The busiest expert's share over the mean share."),
        line_chart("balance loss", balance),
    ]
    return side_by_side(figures)


def _drift(record: Record) -> str:
    series = [
        Series(expert, record.points(f"gate_drift_{expert}"), index) for index, expert in enumerate(record.experts)
    ]
    return side_by_side(
        [line_chart("drift of each expert's gate row", series, floor=0)], "In parts of its length at the start."
    )


def _gradients(record: Record) -> str:
    names = [*record.experts, "router"]
    series = [Series(name, record.points(f"grad_norm_{name}"), index) for index, name in enumerate(names)]
    figures = [
        line_chart("norm of each expert's and the router's gradient", series, floor=0),
        line_chart("norm of the whole gradient", [Series("all", record.points("grad_norm"), 0)], floor=0),
        line_chart("learning rate", [Series("learning rate", record.points("learning_rate"), 0)], floor=0),
        line_chart("speed, tokens per second", [Series("speed", record.points("tokens_per_second"), 0)], floor=0),
    ]
    return side_by_side(figures, "2-norms, before clipping.")


def _alarms(record: Record) -> str:
    if not record.alarms:
        watched = any("lm_loss" in line for line in record.lines)
        return f"<p>{'No alarm was raised.' if watched else 'Nothing was watched: there is no training log.'}</p>"
    return "".join(f"<p class='alarm'>step {step:,}: {escape(text)}</p>" for step, text in record.alarms)


def _samples(record: Record) -> str:
    if not record.samples:
        return "<p class='none'>There are none; a run writes them at its end.</p>"
    places = {name: index for index, name in enumerate(record.experts)}
    parts = [legend([(name, index, False) for name, index in places.items()])]
    parts.append("<p class='note'>The prompt is faint. Point at a token to read its expert's name.</p>")
    for sample in record.samples:
        parts.append(f"<p><b>{escape(short_name(str(sample.get('domain', ''))))}</b></p>")
        spans = []
        tokens, experts = sample.get("tokens") or [], sample.get("experts") or []
        for position, token in enumerate(tokens):
            expert = experts[position] if position < len(experts) else None
            kind = colour_class(places[expert]) if expert in places else "base"
            faint = " prompt" if position < (sample.get("prompt_length") or 0) else ""
            name = escape(str(expert or "the base alone"))
            spans.append(f"<span class='{kind}{faint}' title='{name}'>{escape(str(token))}</span>")
        parts.append(f"<div class='sample'>{''.join(spans)}</div>")
    return "".join(parts)


def _data(record: Record) -> str:
    items = [item for item in record.facts.get("data") or [] if isinstance(item, dict)]
    if not items:
        return "<p class='none'>Not known.</p>"
    rows = []
    for item in items:
        cells = [
            cell(short_name(str(item.get("name", "")))),
            cell(without_secrets(str(item.get("origin") or "")), "long"),
        ]
        cells += [cell(count(item.get(name)), "n") for name in ("train", "evaluation")]
        cells += [cell(percent(item.get(name)), "n") for name in ("share", "token_share")]
        rows.append("".join([*cells, cell(str(item.get("licence") or "not known"))]))
    titles = ["dataset", "from", "rows trained on", "rows held out", "of an epoch's rows", "of its tokens", "licence"]
    return table(titles, rows, {2, 3, 4, 5})


def _configuration(record: Record) -> str:
    rows = [cell(name) + cell(value, "long") for name, value in open_settings(record.settings).items()]
    return table(["flag", "value"], rows, set()) if rows else "<p class='none'>Not known.</p>"


def _versions(record: Record) -> str:
    versions = record.facts.get("versions") or {}
    rows = [cell(str(name)) + cell(str(value)) for name, value in versions.items()]
    started = record.facts.get("started")
    begun = f"<p>The run began at {escape(str(started))}.</p>" if started else ""
    return begun + (table(["", "version"], rows, set()) if rows else "<p class='none'>Not known.</p>")


def _hardware(record: Record) -> str:
    lines = hardware_lines(record.facts.get("hardware") or {})
    return "".join(f"<p>{escape(str(line))}</p>" for line in lines) or "<p class='none'>Not known.</p>"


def _metrics(record: Record) -> str:
    size = math.ceil(len(record.lines) / MAX_RAW_LINES) or 1
    shown = record.lines[::size]
    what = f"all {len(shown):,} lines" if size == 1 else f"{len(shown):,} of {len(record.lines):,} lines, evenly spaced"
    text = escape("\n".join(json.dumps(line, ensure_ascii=False) for line in shown))
    return f"<details><summary>metrics.jsonl, {what}</summary><pre>{text}</pre></details>"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _duration(record: Record) -> str:
    times = [time for line in record.lines if (time := finite(line.get("time"))) is not None]
    return str(timedelta(seconds=round(max(times) - min(times)))) if times else "not known"


SECTIONS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "summary": ("Summary", _summary),
    "losses": ("Loss of each dataset", _losses),
    "benchmarks": ("Code benchmarks", _benchmarks),
    "experts": ("Which expert gets which dataset", _shares),
    "entropy": ("How sure the router is", _entropy),
    "load": ("How evenly the experts are used", _load),
    "drift": ("How far the gate has moved", _drift),
    "gradients": ("Gradients", _gradients),
    "alarms": ("Alarms", _alarms),
    "samples": ("Samples, each token in its expert's colour", _samples),
    "data": ("Data", _data),
    "configuration": ("Configuration", _configuration),
    "versions": ("Versions", _versions),
    "hardware": ("Hardware", _hardware),
    "metrics": ("Raw metrics", _metrics),
}
"""By id: title and maker, in the order of the page."""
