"""The page about a run: what it was made of, what it learned, and where the router sends what."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from itertools import zip_longest
from typing import Any, NamedTuple

from dylo_moe.experts.config import lora_scale
from dylo_moe.model.model_card import hardware_lines
from dylo_moe.report import run_charts
from dylo_moe.report.charts import Key, colour_class, mean, number
from dylo_moe.report.html import Cell, HtmlTable, count, in_short, render, settings_table, share
from dylo_moe.report.run_record import Record, finite
from dylo_moe.report.turns import Answer, turns_in_words
from dylo_moe.utils.redact import short_name, without_secrets
from dylo_moe.utils.words import counted

MAX_RAW_LINES = 400
"""The most lines of metrics.jsonl that are shown on the page."""


def run_page(record: Record) -> str:
    """The page about a run as HTML."""
    facts = record.facts
    evaluated = [step for points in record.losses.values() for step, _ in points]
    every = math.ceil(len(record.lines) / MAX_RAW_LINES) or 1
    return render(
        "run.html.j2",
        title=f"DyLoRA-MoE run {record.name}",
        record=record,
        summary=_summary(record),
        losses=_losses(record),
        first_evaluation=min(evaluated, default=0),
        last_evaluation=max(evaluated, default=0),
        loss_charts=run_charts.loss_charts(record),
        benchmark_charts=run_charts.benchmark_charts(record),
        share_maps=run_charts.share_maps(record),
        shares=_last_shares(record),
        entropy_charts=run_charts.entropy_charts(record),
        load_charts=run_charts.load_charts(record),
        drift_charts=run_charts.drift_charts(record),
        gradient_charts=run_charts.gradient_charts(record),
        expert_keys=[Key(name, colour_class(index)) for index, name in enumerate(record.experts)],
        samples=[
            (
                short_name(str(sample.get("domain", ""))),
                _coloured(sample, record.experts),
                _turns(sample, record.experts),
            )
            for sample in record.samples
        ],
        data=_data(record),
        configuration=settings_table(record.settings),
        started=facts.get("started"),
        versions=HtmlTable(
            ["", "version"],
            [[Cell(str(name)), Cell(str(value))] for name, value in (facts.get("versions") or {}).items()],
        ),
        hardware=hardware_lines(facts.get("hardware") or {}),
        metrics="\n".join(json.dumps(line, ensure_ascii=False) for line in record.lines[::every]),
        metrics_count=_raw_lines(len(record.lines), every),
    )


def _experts(record: Record) -> str:
    shared = record.facts.get("shared") or {}
    more = f", and a shared one of rank {shared['rank']}" if shared.get("rank") else ""
    return f"{len(record.experts):,}{more}" if record.experts else "not known"


def _summary(record: Record) -> list[tuple[str, str]]:
    facts, steps = record.facts, max((line["step"] for line in record.lines), default=0)
    planned = finite(record.settings.get("max_steps")) or -1
    base = facts.get("base") or {}
    return [
        ("state", "finished" if record.is_finished else "not finished"),
        ("base", short_name(without_secrets(str(base.get("id") or record.settings.get("model") or "not known")))),
        ("base parameters", in_short(base.get("parameters"))),
        ("experts", _experts(record)),
        ("an expert's scale", _scale(record.settings)),
        ("parameters trained", in_short(facts.get("trainable"))),
        ("datasets", f"{len(record.domains):,}" if record.domains else "not known"),
        ("optimizer steps", f"{steps:,}" + (f" of {planned:,.0f}" if planned > 0 else "")),
        ("epochs", number(record.last("epoch") or 0, digits=3)),
        ("tokens per second", count(mean([value for _, value in record.points("tokens_per_second")]))),
        ("from first to last log", _duration(record)),
    ]


def _scale(settings: dict[str, Any]) -> str:
    """The factor s of an expert's delta s B A x, of a run whose settings say it."""
    alpha, rank = finite(settings.get("lora_alpha")), finite(settings.get("lora_r"))
    if alpha is None or not rank or rank < 1:
        return "not known"
    return number(lora_scale(alpha, int(rank), use_rslora=settings.get("use_rslora") is True))


def _duration(record: Record) -> str:
    times = [time for line in record.lines if (time := finite(line.get("time"))) is not None]
    return str(timedelta(seconds=round(max(times) - min(times)))) if times else "not known"


def _losses(record: Record) -> HtmlTable:
    rows = []
    for domain, points in record.losses.items():
        if not points:
            continue
        first, last = points[0][1], points[-1][1]
        change = "" if first is None or last is None else f"{last - first:+.4f}"
        kind = "" if not float(change or 0) else " good" if change.startswith("-") else " bad"
        best = min((value for _, value in points if value is not None), default=None)
        losses = [Cell("not finite" if value is None else f"{value:.4f}", "n") for value in (first, last, best)]
        rows.append([Cell(short_name(domain)), *losses, Cell(change, f"n{kind}")])
    return HtmlTable(["dataset", "first", "last", "lowest", "change"], rows)


def _last_shares(record: Record) -> HtmlTable:
    rows = []
    if any(record.losses.values()):
        for index, expert in enumerate(record.experts):
            shares = [record.last(f"eval_{domain}_share_{expert}") for domain in record.domains]
            cells = [Cell(share(part), "n share", None if part is None else round(50 * part)) for part in shares]
            rows.append([Cell(expert, "who", key=colour_class(index)), *cells])
    return HtmlTable(["expert", *map(short_name, record.domains)], rows)


class ColouredToken(NamedTuple):
    """A token of a sample, with the colour of the expert that it was routed to."""

    text: str
    kind: str
    """The CSS classes that give the token its colour."""
    expert: str


def _coloured(sample: dict[str, Any], names: list[str]) -> list[ColouredToken]:
    tokens, experts = sample.get("tokens") or [], sample.get("experts") or []
    found = []
    for position, token in enumerate(tokens):
        expert = experts[position] if position < len(experts) else None
        kind = colour_class(names.index(expert)) if expert in names else "base"
        prompt = " prompt" if position < (sample.get("prompt_length") or 0) else ""
        found.append(ColouredToken(str(token), kind + prompt, str(expert or "the base alone")))
    return found


class WrittenTurn(NamedTuple):
    """What a page says of one answer of a sample, or of the rest of it."""

    text: str
    kind: str
    """The CSS classes that give it the colour of its expert."""


def _turns(sample: dict[str, Any], names: list[str]) -> list[WrittenTurn]:
    """A line for each answer of a sample, and one for the rest; none where routing was not decided by answers."""
    found = sample.get("turns")
    if not isinstance(found, list):
        return []
    answers = [answer for item in found if (answer := _answer(item)) is not None]
    best = [max(answer.experts, key=answer.experts.__getitem__, default="") for answer in answers]
    kinds = [colour_class(names.index(name)) if name in names else "base" for name in best]
    lines = turns_in_words(answers, num_tokens=len(sample.get("tokens") or []))
    return [WrittenTurn(line, kind) for line, kind in zip_longest(lines, kinds, fillvalue="base")]


def _answer(item: Any) -> Answer | None:
    """An answer of samples.json; None for what is none."""
    start, stop, experts = (item.get(name) if isinstance(item, dict) else None for name in ("start", "stop", "experts"))
    first, last = finite(start), finite(stop)
    if first is None or last is None or not isinstance(experts, dict):
        return None
    weights = {str(name): weight for name, value in experts.items() if (weight := finite(value)) is not None}
    return Answer(int(last - first), weights)


def _data(record: Record) -> HtmlTable:
    rows = []
    for item in record.facts.get("data") or []:
        if isinstance(item, dict):
            name, origin = short_name(str(item.get("name", ""))), without_secrets(str(item.get("origin") or ""))
            numbers = [count(item.get(key)) for key in ("train", "evaluation")]
            numbers += [share(item.get(key)) for key in ("share", "token_share")]
            licence = str(item.get("licence") or "not known")
            rows.append([Cell(name), Cell(origin, "long"), *(Cell(text, "n") for text in numbers), Cell(licence)])
    titles = ["dataset", "from", "rows trained on", "rows held out", "of an epoch's rows", "of its tokens", "licence"]
    return HtmlTable(titles, rows)


def _raw_lines(total: int, every: int) -> str:
    shown = len(range(0, total, every))
    lines = counted(total, "line")
    return lines if every == 1 else f"{shown:,} of {lines}, evenly spaced"
