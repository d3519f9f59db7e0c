"""The page about a stream: what was learned and forgotten stage after stage, and what was decided and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.evaluation.loss_matrix import FIGURES, OF_UNLEARNED, Matrix, shown
from dylo_moe.report.html import Cell, HtmlTable, page_link, render, settings_table, tinted
from dylo_moe.report.loss_matrix_table import LISTED, figure_rows, is_large, stage_label
from dylo_moe.report.run_record import finite
from dylo_moe.report.stream_record import StreamRecord
from dylo_moe.utils.redact import short_name, without_secrets

MIN_SCALE = 0.05
"""The smallest change with the full tint, in nats per token, so that noise does not look like harm."""

MEANINGS = {
    "loss": "nats per token, of every skill, learned or not",
    "forgetting": "the last loss minus the loss just after the skill was learned; above 0 is worse",
    "backward_transfer": "the same with its sign changed; above 0: later stages made the skill better",
    "forward_transfer": "the base's loss minus that just before the skill was learned; above 0: earlier skills helped",
    "gain_kept": "the gain over the base now, as a share of the gain of the skill's own expert just after learning",
    "routing_accuracy": "share of a learned skill's held-out tokens that go to its own expert",
    "left_to_base": "share of the tokens of text that is never trained which go to the unchanged base",
    "drift": "the last loss minus the base's, of text that is never trained; above 0 is worse",
}
"""The meaning of each figure in a sentence."""

UNMEASURED = "Nothing was measured yet."


class ChangeMap(NamedTuple):
    """Changes of the loss as numbers in tinted cells."""

    table: HtmlTable
    scale: str
    """The change from which on the tint is full."""


def stream_page(record: StreamRecord, home: Path) -> str:
    """The page about a stream as HTML.

    Args:
        home: the folder that the page will be written to; links to the stages' pages are relative to it.
    """
    matrix = record.matrix
    return render(
        "stream.html.j2",
        title=f"DyLoRA-MoE stream {record.name}",
        record=record,
        matrix=matrix,
        unmeasured=UNMEASURED,
        summary=_summary(record),
        figures=_figures(matrix),
        is_large=is_large(matrix),
        least=_least(matrix),
        each_skill=_each_skill(matrix, matrix.skills),
        gains=_change_map(matrix, lambda place, column: _gain(matrix, place, column), lambda place, column: True),
        changes=_change_map(matrix, matrix.change, lambda place, column: _is_learned(matrix, place, column)),
        decisions=_decisions(record, home),
        has_pages=any(record.pages),
        losses=_losses(matrix),
        routed=_share_map(matrix) if is_large(matrix) else None,
        alone=_expert_cells(matrix, "alone", "{:.4f}"),
        accuracy=_expert_cells(matrix, "accuracy", "{:.1%}"),
        configuration=settings_table(record.settings),
    )


def _summary(record: StreamRecord) -> list[tuple[str, str]]:
    matrix = record.matrix
    rows = {row.name: row for row in figure_rows(matrix)}
    states = {True: "finished", False: "not finished", None: "not known"}
    seconds = round(sum(stage.seconds for stage in matrix.stages))
    return [
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


def _figures(matrix: Matrix) -> HtmlTable:
    rows = [
        [Cell(row.title), Cell(row.mean, "n"), Cell(row.worst, "n"), Cell(row.which), Cell(MEANINGS[row.name], "long")]
        for row in (figure_rows(matrix) if matrix.stages else [])
    ]
    return HtmlTable(["", "mean", "worst", "worst skill; skills counted", "meaning"], rows)


def _least(matrix: Matrix) -> HtmlTable | None:
    """Of a matrix of many skills those that keep least of their experts' gain."""
    if not is_large(matrix):
        return None
    kept = matrix.gain_kept().known
    return _each_skill(matrix, sorted(kept, key=lambda skill: finite(kept[skill]) or -math.inf)[:LISTED])


def _each_skill(matrix: Matrix, skills: Sequence[str]) -> HtmlTable:
    """Make a table with a row for each of these skills, and a column for each figure that has a value for a skill."""
    names = [name for name in FIGURES if name not in (*OF_UNLEARNED, "backward_transfer")]
    figures = {name: FIGURES[name].of(matrix) for name in names}
    rows = []
    for skill in skills:
        learned = matrix.learned_at(skill)
        cells = [Cell(skill, "stage"), Cell(shown(matrix.base.get(skill)), "n")]
        if learned is None:
            cells += [Cell("never"), Cell("", "n")]
        else:
            cells += [Cell(stage_label(matrix, learned)), Cell(shown(matrix.stages[learned].losses.get(skill)), "n")]
        for name, figure in figures.items():
            cells.append(Cell(FIGURES[name].show(figure.values[skill]) if skill in figure.values else "", "n"))
        rows.append(cells)
    titles = ["skill", "base", "learned in", "just after", "last", "forgetting", "forward transfer", "gain kept"]
    return HtmlTable([*titles, "routing accuracy"], rows)


def _gain(matrix: Matrix, place: int, column: str) -> float | None:
    now, base = matrix.stages[place].losses.get(column), matrix.base.get(column)
    return None if now is None or base is None else now - base


def _is_learned(matrix: Matrix, place: int, column: str) -> bool:
    learned = matrix.learned_at(column)
    return column in matrix.unlearned or (learned is not None and place >= learned)


def _change_map(
    matrix: Matrix, change: Callable[[int, str], float | None], applies: Callable[[int, str], bool]
) -> ChangeMap | None:
    """Make a table with a row for each stage and a column for each skill; each cell is a change of the loss, tinted.

    Of many skills the number is in the hover title only.
    """
    if not matrix.stages:
        return None
    columns = [*matrix.skills, *matrix.unlearned]
    changes = {(place, column): change(place, column) for place in range(len(matrix.stages)) for column in columns}
    scale = max([MIN_SCALE, *(abs(value) for value in changes.values() if value is not None and math.isfinite(value))])
    learned = {column: matrix.learned_at(column) for column in columns}
    rows = []
    for place, stage in enumerate(matrix.stages):
        cells = [Cell(stage_label(matrix, place), "stage")]
        for column in columns:
            value, loss = changes[place, column], stage.losses.get(column)
            if value is None:
                missing = "not measured" if applies(place, column) and not is_large(matrix) else ""
                cells.append(Cell(missing, "blank"))
                continue
            hover = f"{column} after {stage.name}: loss {shown(loss)}, base {shown(matrix.base.get(column))}"
            kind, text = "learned" if place == learned[column] else "", shown(value, "{:+.3f}")
            if is_large(matrix):
                cells.append(tinted(value, scale, "", hover=f"{column} after {stage.name}: {text}", kind=kind))
            else:
                cells.append(tinted(value, scale, text, hover=hover, kind=kind))
        rows.append(cells)
    return ChangeMap(HtmlTable(["after stage", *columns], rows, "map" if is_large(matrix) else ""), f"{scale:.3g}")


def _share_map(matrix: Matrix) -> HtmlTable:
    """Make a map of the shares of tokens that are sent to the skill's own expert, a cell for each stage and skill."""
    columns = [*matrix.skills, *matrix.unlearned]
    rows = []
    for place, stage in enumerate(matrix.stages):
        cells = [Cell(stage_label(matrix, place), "stage")]
        for name in columns:
            known = finite(stage.accuracy.get(name))
            hover = "" if known is None else f"{name} after {stage.name}: {known:.1%}"
            cells.append(
                Cell("", "" if known is None else "share", None if known is None else round(80 * known), hover)
            )
        rows.append(cells)
    return HtmlTable(["after stage", *columns], rows if any(stage.accuracy for stage in matrix.stages) else [], "map")


DECISION = {
    "novel": ("new", ""),
    "score": ("score", "n"),
    "threshold": ("threshold", "n"),
    "nearest": ("nearest skill", ""),
    "entropy": ("entropy", "n"),
    "action": ("action", ""),
    "expert": ("expert", ""),
    "skill": ("learned as", ""),
}
"""The entries of a decision that have a column of their own, with its title and its CSS class."""


def _decisions(record: StreamRecord, home: Path) -> HtmlTable:
    stages = record.matrix.stages
    has_more = any(stage.decision.keys() - set(DECISION) for stage in stages)
    rows = []
    for place, (stage, page) in enumerate(zip(stages, record.pages, strict=True)):
        decision = stage.decision
        cells = [Cell(f"{place + 1} {stage.name}", "stage")]
        cells += [Cell(_word(decision.get(name)), kind) for name, (_, kind) in DECISION.items()]
        cells += [Cell(f"{stage.tokens:,}", "n"), Cell(f"{stage.seconds:,.0f}", "n"), _link(page, home)]
        if has_more:
            more = {name: value for name, value in decision.items() if name not in DECISION}
            cells.append(Cell(", ".join(f"{name} {_word(value)}" for name, value in more.items()), "long"))
        rows.append(cells)
    titles = ["stage", *(title for title, _ in DECISION.values()), "tokens", "seconds", "its run"]
    return HtmlTable([*titles, "more"] if has_more else titles, rows)


def _link(page: Path | None, home: Path) -> Cell:
    if page is None:
        return Cell("")
    return Cell("page", link=page_link(page, home))


def _word(value: Any) -> str:
    known = finite(value)
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return str(value) if known is None else f"{known:.4g}"


def _losses(matrix: Matrix) -> HtmlTable:
    columns = [*matrix.skills, *matrix.unlearned]
    lines = [("base", matrix.base)]
    lines += [(stage_label(matrix, place), stage.losses) for place, stage in enumerate(matrix.stages)]
    rows = [
        [Cell(label, "stage"), *(Cell(shown(losses.get(name)), "n") for name in columns)] for label, losses in lines
    ]
    return HtmlTable(["after stage", *columns], rows if matrix.stages else [])


def _expert_cells(matrix: Matrix, which: str, template: str) -> HtmlTable:
    """A table of `alone` or `accuracy` by stage and skill; a cell is empty if the skill had no expert yet."""
    found = [getattr(stage, which) for stage in matrix.stages]
    columns = matrix.skills
    if any(text in cells for cells in found for text in matrix.unlearned):
        columns = [*columns, *matrix.unlearned]
    rows = [
        [Cell(stage_label(matrix, place), "stage")]
        + [Cell(shown(cells[name], template) if name in cells else "", "n") for name in columns]
        for place, cells in enumerate(found)
    ]
    return HtmlTable(["after stage", *columns], rows if any(found) else [])
