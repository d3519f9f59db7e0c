"""One page about a run: what it learned, where its tokens went, what it was made of. It needs no network and no script."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from .card import hardware_lines, open_settings, short_name, without_secrets
from .charts import STYLE, Series, colour_class, heatmap, legend, line_chart, mean, number
from .record import Points, Record, finite, read_record

REPORT = "report.html"
MAX_RAW_LINES = 400
"""Of metrics.jsonl, on the page."""

PAGE_STYLE = (
    """
:root{color-scheme:light dark;--surface:#fff;--page:#f4f6f7;--ink:#1b2126;--faint:#5d6870;--good:#00725c;--bad:#b34700}
@media(prefers-color-scheme:dark){:root{--surface:#191e22;--page:#101417;--ink:#e8ecee;--faint:#9aa5ad;--good:#43cfa6;
--bad:#ff9a5c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.6rem;line-height:1.25;margin:.4em 0;overflow-wrap:anywhere} h2{font-size:1.15rem;margin:0 0 .6em}
section{background:var(--surface);border-radius:12px;padding:18px;margin:14px 0}
p{margin:.4em 0;max-width:75ch} .caption,.none,.note{color:var(--faint);font-size:.87rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px;margin:0 0 14px}
.tiles div{background:var(--page);border-radius:8px;padding:8px 12px} .tiles b{display:block;font-size:1.15rem;
overflow-wrap:anywhere;line-height:1.3} .tiles span{color:var(--faint);font-size:.8rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:20px}
figure{margin:0;max-width:600px;min-width:0} figcaption{font-weight:600;font-size:.95rem;margin-bottom:4px;
overflow-wrap:anywhere} svg{display:block;width:100%;height:auto;font-family:inherit}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:0 0 4px;padding:0;font-size:.85rem}
.legend li{overflow-wrap:anywhere} .legend i{display:inline-block;width:16px;border-top:3px var(--border) var(--c);
margin-right:5px;vertical-align:middle}
.wide{overflow-x:auto} table{border-collapse:collapse;font-size:.9rem} th,td{padding:4px 12px 4px 0;text-align:left;
vertical-align:top;border-bottom:1px solid var(--grid)} th{color:var(--faint);font-weight:500}
td{overflow-wrap:anywhere;min-width:3.5em} .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.share{background:color-mix(in srgb,var(--heat) var(--p),transparent);padding-right:12px}
.good{color:var(--good)} .bad{color:var(--bad)} .alarm{border-left:4px solid var(--bad);padding-left:10px}
.sample{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.75 ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",
monospace;background:var(--page);border-radius:8px;padding:10px 12px;margin:.3em 0 1em}
.sample span{border-bottom:2px var(--border) var(--c);background:color-mix(in srgb,var(--c) 20%,transparent)}
.sample .prompt{opacity:.55} .sample .base{border-bottom:2px solid transparent}
.scale{display:inline-block;width:90px;height:10px;border-radius:3px;vertical-align:middle;
background:linear-gradient(90deg,var(--grid),var(--heat))}
pre{overflow:auto;max-height:420px;background:var(--page);border-radius:8px;padding:10px;font-size:12px}
summary{cursor:pointer;font-weight:600}
"""
    + STYLE
)


def run(folder: str, output: str | None = None) -> Path:
    """Write the page about the run in `folder`; returns where it lies, by default report.html in that folder.

    Raises:
        ValueError: for a folder that is no run's, or an output that is a folder.
    """
    record = read_record(Path(folder))
    target = Path(folder) / REPORT if output is None else Path(output)
    if target.is_dir():
        raise ValueError(f"output {target} is a folder; name a file, such as {target / REPORT}")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.partial")
    try:
        aside.write_bytes(page(record).encode("utf-8", errors="replace"))  # a text may hold half a surrogate pair
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target


SECTIONS: dict[str, tuple[str, Callable[[Record], str]]] = {}
"""By id: title and maker, in the order of the page."""


def _section(identity: str, title: str) -> Callable[[Callable[[Record], str]], Callable[[Record], str]]:
    def add(maker: Callable[[Record], str]) -> Callable[[Record], str]:
        SECTIONS[identity] = (title, maker)
        return maker

    return add


def page(record: Record) -> str:
    """The whole page. Its policy forbids scripts and requests, whatever a text of the run holds."""
    parts = [
        f"<section id='{identity}'><h2>{title}</h2>{maker(record)}</section>"
        for identity, (title, maker) in SECTIONS.items()
    ]
    title = f"DyLoRA-MoE run {escape(record.name)}"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "img-src data:\"><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><title>{title}</title><style>{PAGE_STYLE}</style></head>"
        f"<body><main><h1>{title}</h1>{''.join(parts)}</main></body></html>\n"
    )


@_section("summary", "Summary")
def _summary(record: Record) -> str:
    facts, steps = record.facts, max((line["step"] for line in record.lines), default=0)
    planned = finite(record.settings.get("max_steps")) or -1
    of = f" of {planned:,.0f}" if planned > 0 else ""
    base = facts.get("base") or {}
    tiles = [
        ("state", "finished" if record.is_finished else "not finished"),
        ("base", short_name(without_secrets(str(base.get("id") or record.settings.get("model") or "not known")))),
        ("base parameters", _count(base.get("parameters"))),
        ("experts", f"{len(record.experts):,}" if record.experts else "not known"),
        ("parameters trained", _count(facts.get("trainable"))),
        ("datasets", f"{len(record.domains):,}" if record.domains else "not known"),
        ("optimizer steps", f"{steps:,}{of}"),
        ("epochs", number(record.last("epoch") or 0)),
        ("tokens per second", _count(mean([value for _, value in record.points("tokens_per_second")]))),
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
        kind = "" if not change else " good" if change.startswith("-") else " bad"
        best = min((value for _, value in points if value is not None), default=None)
        cells = [_cell(short_name(domain)), *(_cell(_loss(value), "n") for value in (first, last, best))]
        rows.append("".join([*cells, _cell(change, f"n{kind}")]))
    if not rows:
        return "<p class='none'>No evaluation was logged.</p>"
    evaluated = [step for points in record.losses.values() for step, _ in points]
    note = f"Held-out loss in nats per token: of the first evaluation (step {min(evaluated):,}), the last (step "
    note += f"{max(evaluated):,}), and the lowest of all."
    return _table(["dataset", "first", "last", "lowest", "change"], rows, {1, 2, 3, 4}) + f"<p class='note'>{note}</p>"


@_section("losses", "Loss of each dataset")
def _losses(record: Record) -> str:
    charts = []
    for index, domain in enumerate(record.domains):
        series = [
            Series("training", record.points(f"loss_{domain}"), index),
            Series("held out", record.losses[domain], index, dots=True),
        ]
        charts.append(line_chart(short_name(domain), series))
    whole = [Series("language model", record.points("lm_loss"), 0), Series("with all terms", record.points("loss"), 1)]
    charts.append(line_chart("all training tokens", whole))
    return _charts(charts, "Nats per token. Lines: means over the training tokens since the last log; dots: held out.")


@_section("experts", "Which expert gets which dataset")
def _shares(record: Record) -> str:
    charts = []
    for domain in record.domains:
        keys = [(expert, f"share_{domain}_{expert}") for expert in record.experts]
        if not any(record.points(key) for _, key in keys):
            keys = [(expert, f"eval_{domain}_share_{expert}") for expert in record.experts]
        steps = sorted({step for _, key in keys for step, _ in record.points(key)})
        known = [(expert, dict(record.points(key))) for expert, key in keys]
        rows: list[tuple[str, Points]] = [
            (expert, [(step, values.get(step)) for step in steps]) for expert, values in known
        ]
        charts.append(heatmap(short_name(domain), rows))
    note = (
        "Share of a dataset's tokens that went to each expert, over the steps: 0 % <span class='scale'></span> 100 %."
    )
    return f"<p class='note'>{note}</p>{_charts(charts)}{_final_shares(record)}"


def _final_shares(record: Record) -> str:
    rows = []
    for index, expert in enumerate(record.experts):
        cells = [f"<td><i class='key {colour_class(index)}'></i>{escape(expert)}</td>"]
        for domain in record.domains:
            share = record.last(f"eval_{domain}_share_{expert}")
            tint = f" style='--p:{round(100 * share)}%'" if share is not None else ""
            cells.append(f"<td class='n share'{tint}>{'' if share is None else f'{share:.1%}'}</td>")
        rows.append("".join(cells))
    if not any(record.points(f"eval_{domain}_loss") for domain in record.domains) or not rows:
        return ""
    titles = ["expert", *(short_name(domain) for domain in record.domains)]
    table = _table(titles, rows, set(range(1, len(titles))))
    return f"<p><b>The last evaluation</b>, share of the held-out tokens</p>{table}"


@_section("entropy", "How sure the router is")
def _entropy(record: Record) -> str:
    highest = math.log(max(len(record.experts), 1))
    marks = [(highest, f"log({len(record.experts)})")] if len(record.experts) > 1 else []
    training = [
        Series("of one token", record.points("token_entropy"), 0),
        Series("of the mean", record.points("average_entropy"), 1),
    ]
    held_out = [
        Series(f"{short_name(domain)}, {words}", record.points(f"eval_{domain}_{key}_entropy"), index)
        for index, (domain, key, words) in enumerate(
            (domain, key, words)
            for key, words in (("token", "token"), ("average", "mean"))
            for domain in record.domains
        )
    ]
    charts = [
        line_chart("entropy in training", training, floor=0, marks=marks),
        line_chart("entropy on held-out text", held_out, floor=0, marks=marks),
    ]
    return _charts(
        charts,
        "Nats. Of one token, low: the router is sure of each token. Of the mean, high: all experts are used; the "
        "dotted line is an even use of all.",
    )


@_section("load", "How evenly the experts are used")
def _load(record: Record) -> str:
    shares = [Series(expert, record.points(f"share_{expert}"), index) for index, expert in enumerate(record.experts)]
    even = [(1 / len(record.experts), "even")] if len(record.experts) > 1 else []
    imbalance = [Series("load imbalance", record.points("load_imbalance"), 0)]
    balance = [Series("balance loss", record.points("balance_loss"), 0)]
    charts = [
        line_chart("share of all training tokens", shares, floor=0, marks=even),
        line_chart("load imbalance", imbalance, floor=1, caption="The busiest expert's share over the mean share."),
        line_chart("balance loss", balance),
    ]
    return _charts(charts)


@_section("drift", "How far the gate has moved")
def _drift(record: Record) -> str:
    series = [
        Series(expert, record.points(f"gate_drift_{expert}"), index) for index, expert in enumerate(record.experts)
    ]
    return _charts(
        [line_chart("drift of each expert's gate row", series, floor=0)], "In parts of its length at the start."
    )


@_section("gradients", "Gradients")
def _gradients(record: Record) -> str:
    names = [*record.experts, "router"]
    series = [Series(name, record.points(f"grad_norm_{name}"), index) for index, name in enumerate(names)]
    charts = [
        line_chart("norm of each expert's and the router's gradient", series, floor=0),
        line_chart("norm of the whole gradient", [Series("all", record.points("grad_norm"), 0)], floor=0),
        line_chart("learning rate", [Series("learning rate", record.points("learning_rate"), 0)], floor=0),
        line_chart("speed, tokens per second", [Series("speed", record.points("tokens_per_second"), 0)], floor=0),
    ]
    return _charts(charts, "2-norms, before clipping.")


@_section("alarms", "Alarms")
def _alarms(record: Record) -> str:
    if not record.alarms:
        watched = any("lm_loss" in line for line in record.lines)
        return f"<p>{'No alarm was raised.' if watched else 'Nothing was watched: there is no training log.'}</p>"
    return "".join(f"<p class='alarm'>step {step:,}: {escape(text)}</p>" for step, text in record.alarms)


@_section("samples", "Samples, each token in its expert's colour")
def _samples(record: Record) -> str:
    if not record.samples:
        return "<p class='none'>There are none; a run writes them at its end.</p>"
    places = {name: index for index, name in enumerate(record.experts)}
    parts = [legend([(name, index) for name, index in places.items()])]
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


@_section("data", "Data")
def _data(record: Record) -> str:
    items = [item for item in record.facts.get("data") or [] if isinstance(item, dict)]
    if not items:
        return "<p class='none'>Not known.</p>"
    rows = []
    for item in items:
        cells = [_cell(short_name(str(item.get("name", "")))), _cell(without_secrets(str(item.get("origin") or "")))]
        cells += [_cell(_count(item.get(name)), "n") for name in ("train", "evaluation")]
        cells += [_cell(_percent(item.get(name)), "n") for name in ("share", "token_share")]
        rows.append("".join([*cells, _cell(str(item.get("licence") or "not known"))]))
    titles = ["dataset", "from", "rows trained on", "rows held out", "of an epoch's rows", "of its tokens", "licence"]
    return _table(titles, rows, {2, 3, 4, 5})


@_section("configuration", "Configuration")
def _configuration(record: Record) -> str:
    rows = [_cell(name) + _cell(value) for name, value in open_settings(record.settings).items()]
    return _table(["flag", "value"], rows, set()) if rows else "<p class='none'>Not known.</p>"


@_section("versions", "Versions")
def _versions(record: Record) -> str:
    versions = record.facts.get("versions") or {}
    rows = [_cell(str(name)) + _cell(str(value)) for name, value in versions.items()]
    started = record.facts.get("started")
    begun = f"<p>The run began at {escape(str(started))}.</p>" if started else ""
    return begun + (_table(["", "version"], rows, set()) if rows else "<p class='none'>Not known.</p>")


@_section("hardware", "Hardware")
def _hardware(record: Record) -> str:
    lines = hardware_lines(record.facts.get("hardware") or {})
    return "".join(f"<p>{escape(str(line))}</p>" for line in lines) or "<p class='none'>Not known.</p>"


@_section("metrics", "Raw metrics")
def _metrics(record: Record) -> str:
    size = math.ceil(len(record.lines) / MAX_RAW_LINES) or 1
    shown = record.lines[::size]
    what = f"all {len(shown):,} lines" if size == 1 else f"{len(shown):,} of {len(record.lines):,} lines, evenly spaced"
    text = escape("\n".join(json.dumps(line, ensure_ascii=False) for line in shown))
    return f"<details><summary>metrics.jsonl, {what}</summary><pre>{text}</pre></details>"


def _charts(charts: Sequence[str], note: str = "") -> str:
    return (f"<p class='note'>{note}</p>" if note else "") + f"<div class='charts'>{''.join(charts)}</div>"


def _table(titles: Sequence[str], rows: Sequence[str], right: set[int]) -> str:
    head = "".join(
        f"<th{' class=n' if index in right else ''}>{escape(title)}</th>" for index, title in enumerate(titles)
    )
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></div>"


def _cell(text: str, kind: str = "") -> str:
    return f"<td{f' class={kind!r}' if kind else ''}>{escape(text)}</td>"


def _count(value: Any) -> str:
    known = finite(value)
    return "not known" if known is None else f"{known:,.0f}"


def _percent(value: Any) -> str:
    known = finite(value)
    return "" if known is None else f"{known:.1%}"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _duration(record: Record) -> str:
    times = [time for line in record.lines if (time := finite(line.get("time"))) is not None]
    return str(timedelta(seconds=round(max(times) - min(times)))) if times else "not known"
