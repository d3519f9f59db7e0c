"""One page about a stream: what was learned stage after stage, what was forgotten, what was decided and why."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dylo_moe.evaluation.loss_matrix import FIGURES, OF_UNLEARNED, Matrix, shown
from dylo_moe.report.html import cell, html_page, table, tint_legend, tinted
from dylo_moe.report.loss_matrix_table import figure_rows, stage_label
from dylo_moe.report.run_record import finite
from dylo_moe.report.stream_record import StreamRecord
from dylo_moe.utils.redact import open_settings, short_name, without_secrets

MIN_SCALE = 0.05
"""Nats per token that have the full tint at least, so that noise is not painted like harm."""

UNIT = "nats per token"

MEANINGS = {
    "loss": "nats per token, of every skill, learned or not",
    "forgetting": "last loss less that just after learning; above 0: worse",
    "backward_transfer": "the same with its sign turned; above 0: what came later made it better",
    "forward_transfer": "the base's loss less that just before the skill was learned; above 0: earlier skills helped",
    "gain_kept": "gain over the base now, in parts of the gain of the skill's own expert just after learning",
    "routing_accuracy": "share of a learned skill's held-out tokens that go to its own expert",
    "left_to_base": "share of the tokens of text that was never trained which go to the unchanged base",
    "drift": "last loss less the base's, of text that is never trained; above 0: worse",
}


def stream_page(record: StreamRecord, home: Path) -> str:
    """The whole page.

    Args:
        home: the folder that the page will lie in; links to the stages' pages are relative to it.
    """
    parts = [
        ("summary", "Summary", _summary(record)),
        ("figures", "What the matrix says", _figures(record.matrix)),
        ("gains", "Loss against the base", _gains(record.matrix)),
        ("changes", "Loss against just after learning", _changes(record.matrix)),
        ("decisions", "What each stage decided", _decisions(record, home)),
        ("losses", "Held-out loss after each stage", _losses(record.matrix)),
        ("alone", "Loss of each skill's own expert alone", _cells(record.matrix, "alone", "{:.4f}")),
        ("accuracy", "Share of tokens sent to the skill's own expert", _cells(record.matrix, "accuracy", "{:.1%}")),
        ("configuration", "Configuration", _configuration(record.settings)),
    ]
    return html_page(f"DyLoRA-MoE stream {record.name}", parts)


def _summary(record: StreamRecord) -> str:
    matrix = record.matrix
    rows = {row.name: row for row in figure_rows(matrix)}
    states = {True: "finished", False: "not finished", None: "not known"}
    seconds = round(sum(stage.seconds for stage in matrix.stages))
    tiles = [
        ("state", states[record.is_finished]),
        ("base", short_name(without_secrets(str(record.settings.get("model") or "not known")))),
        ("stages", f"{len(matrix.stages):,}"),
        ("skills learned", f"{sum(bool(matrix.taught(skill)) for skill in matrix.skills):,} of {len(matrix.skills):,}"),
        ("gain kept, mean", rows["gain_kept"].mean),
        ("gain kept, worst", rows["gain_kept"].worst),
        ("forgetting, mean", rows["forgetting"].mean),
        ("forgetting, worst", rows["forgetting"].worst),
        ("routing accuracy", rows["routing_accuracy"].mean),
        ("tokens trained on", f"{sum(stage.tokens for stage in matrix.stages):,}"),
        ("time of the stages", str(timedelta(seconds=seconds))),
    ]
    boxes = "".join(f"<div><span>{name}</span><b>{escape(value)}</b></div>" for name, value in tiles)
    return f"<div class='tiles'>{boxes}</div>" + "".join(f"<p class='alarm'>{escape(t)}</p>" for t in record.missing)


def _figures(matrix: Matrix) -> str:
    if not matrix.stages:
        return _nothing()
    rows = []
    for row in figure_rows(matrix):
        cells = [cell(row.title), cell(row.mean, "n"), cell(row.worst, "n"), cell(row.which)]
        rows.append("".join([*cells, cell(MEANINGS[row.name], "long")]))
    titles = ["", "mean", "worst", "the worst; of how many", "what it is"]
    return table(titles, rows, {1, 2}) + _each_skill(matrix)


def _each_skill(matrix: Matrix) -> str:
    figures = {
        name: kind.of(matrix) for name, kind in FIGURES.items() if name not in (*OF_UNLEARNED, "backward_transfer")
    }
    rows = []
    for skill in matrix.skills:
        learned = matrix.learned_at(skill)
        cells = [cell(skill, "stage"), cell(shown(matrix.base.get(skill)), "n")]
        cells.append(cell("never" if learned is None else stage_label(matrix, learned)))
        after = None if learned is None else matrix.stages[learned].losses.get(skill)
        cells.append(cell("" if learned is None else shown(after), "n"))
        for name, figure in figures.items():
            known = skill in figure.values
            cells.append(cell(FIGURES[name].show(figure.values[skill]) if known else "", "n"))
        rows.append("".join(cells))
    titles = ["skill", "base", "learned in", "just after", "last", "forgetting", "forward transfer", "gain kept"]
    whole = table([*titles, "routing accuracy"], rows, {1, 3, 4, 5, 6, 7, 8})
    return f"<p><b>Each skill</b>. Empty: it does not apply to this skill.</p>{whole}"


def _gains(matrix: Matrix) -> str:
    def against_base(place: int, column: str) -> float | None:
        now, base = matrix.stages[place].losses.get(column), matrix.base.get(column)
        return None if now is None or base is None else now - base

    return _heatmap(
        matrix,
        against_base,
        lambda place, column: True,
        "below 0: better than the base alone. Framed: just after learning.",
    )


def _changes(matrix: Matrix) -> str:
    def is_learned(place: int, column: str) -> bool:
        learned = matrix.learned_at(column)
        return column in matrix.unlearned or (learned is not None and place >= learned)

    note = "above 0: forgotten. Framed: just after learning; unlearned text is compared with the base."
    return _heatmap(matrix, matrix.change, is_learned, note)


def _heatmap(
    matrix: Matrix, change: Callable[[int, str], float | None], applies: Callable[[int, str], bool], note: str
) -> str:
    """Stages down, skills to the right, each cell the change of the loss as a number on its tint."""
    if not matrix.stages:
        return _nothing()
    columns = [*matrix.skills, *matrix.unlearned]
    changes = {(place, column): change(place, column) for place in range(len(matrix.stages)) for column in columns}
    scale = max([MIN_SCALE, *(abs(value) for value in changes.values() if value is not None and math.isfinite(value))])
    learned = {column: matrix.learned_at(column) for column in columns}
    rows = []
    for place, stage in enumerate(matrix.stages):
        cells = [cell(stage_label(matrix, place), "stage")]
        for column in columns:
            value, loss = changes[place, column], stage.losses.get(column)
            if value is None:
                cells.append(cell("not measured" if applies(place, column) else "", "blank"))
                continue
            told = f"{column} after {stage.name}: loss {shown(loss)}, base {shown(matrix.base.get(column))}"
            kind = "learned" if place == learned[column] else ""
            cells.append(tinted(value, scale, shown(value, "{:+.3f}"), told=told, kind=kind))
        rows.append("".join(cells))
    whole = table(["after stage", *columns], rows, set(range(1, len(columns) + 1)))
    return f"<p class='note'>Change of the held-out loss; {note} {tint_legend(scale, UNIT)}.</p>{whole}"


def _decisions(record: StreamRecord, home: Path) -> str:
    matrix = record.matrix
    if not matrix.stages:
        return _nothing()
    rows, has_more = [], any(stage.decision.keys() - set(SHOWN) for stage in matrix.stages)
    for place, (stage, page) in enumerate(zip(matrix.stages, record.pages, strict=True)):
        decision = stage.decision
        cells = [cell(f"{place + 1} {stage.name}", "stage")]
        cells += [cell(_word(decision.get(name)), SHOWN[name][1]) for name in SHOWN]
        cells += [cell(f"{stage.tokens:,}", "n"), cell(f"{stage.seconds:,.0f}", "n"), _link(page, home)]
        if has_more:
            more = {name: value for name, value in decision.items() if name not in SHOWN}
            cells.append(cell(", ".join(f"{name} {_word(value)}" for name, value in more.items()), "long"))
        rows.append("".join(cells))
    titles = ["stage", *(title for title, _ in SHOWN.values()), "tokens", "seconds", "its run"]
    right = {place for place, (_, kind) in enumerate(SHOWN.values(), start=1) if kind} | {
        len(SHOWN) + 1,
        len(SHOWN) + 2,
    }
    note = "New is what scores above the threshold; with the cosine method, below it."
    hint = "" if any(record.pages) else " A stage's run has a page once <b>dylora report</b> was given its folder."
    return f"<p class='note'>{note}{hint}</p>{table([*titles, 'more'] if has_more else titles, rows, right)}"


SHOWN = {
    "novel": ("new", ""),
    "score": ("score", "n"),
    "threshold": ("threshold", "n"),
    "nearest": ("nearest skill", ""),
    "entropy": ("entropy", "n"),
    "action": ("action", ""),
    "expert": ("expert", ""),
    "skill": ("learned as", ""),
}
"""Of a decision: the title of each one's column, and its CSS class."""


def _losses(matrix: Matrix) -> str:
    if not matrix.stages:
        return _nothing()
    columns = [*matrix.skills, *matrix.unlearned]
    rows = [cell("base", "stage") + "".join(cell(shown(matrix.base.get(name)), "n") for name in columns)]
    for place, stage in enumerate(matrix.stages):
        numbers = "".join(cell(shown(stage.losses.get(name)), "n") for name in columns)
        rows.append(cell(stage_label(matrix, place), "stage") + numbers)
    unlearned = f" Never trained: {escape(', '.join(matrix.unlearned))}." if matrix.unlearned else ""
    titles = ["after stage", *columns]
    return f"<p class='note'>Nats per token, routed.{unlearned}</p>" + table(titles, rows, set(range(1, len(titles))))


def _cells(matrix: Matrix, which: str, template: str) -> str:
    """One of the other numbers of each stage and skill; empty where the skill had no expert yet."""
    if not any(getattr(stage, which) for stage in matrix.stages):
        return _nothing()
    rows, columns = [], matrix.skills
    if any(text in getattr(stage, which) for stage in matrix.stages for text in matrix.unlearned):
        columns = [*columns, *matrix.unlearned]
    for place, stage in enumerate(matrix.stages):
        found = getattr(stage, which)
        texts = [shown(found[name], template) if name in found else "" for name in columns]
        rows.append(cell(stage_label(matrix, place), "stage") + "".join(cell(text, "n") for text in texts))
    own = " Of text that is never trained: the share of the base." if len(columns) > len(matrix.skills) else ""
    note = f"<p class='note'>Empty: not measured, or the skill had no expert of its own.{own}</p>"
    return note + table(["after stage", *columns], rows, set(range(1, len(columns) + 1)))


def _configuration(settings: dict[str, Any]) -> str:
    rows = [cell(name) + cell(value, "long") for name, value in open_settings(settings).items()]
    return table(["flag", "value"], rows, set()) if rows else "<p class='none'>Not known.</p>"


def _link(page: Path | None, home: Path) -> str:
    if page is None:
        return cell("")
    address = quote(Path(os.path.relpath(page, home.resolve())).as_posix())
    return f"<td><a href='./{escape(address)}'>page</a></td>"


def _word(value: Any) -> str:
    known = finite(value)
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return str(value) if known is None else f"{known:.4g}"


def _nothing() -> str:
    return "<p class='none'>Nothing was measured yet.</p>"
