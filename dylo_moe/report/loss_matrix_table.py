"""Show the loss matrix on a terminal of any width: a row for each stage, a column for each skill.

Of more than `MANY` skills, whose columns no screen holds, it shows the last row of the matrix alone: the skills that
were just learned, and those that lost most since they were learned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from dylo_moe.evaluation.loss_matrix import FIGURES, OF_UNLEARNED, Matrix, shown
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table
from dylo_moe.utils.words import counted

NOTABLE = 0.005
"""The smallest change that has a colour, in nats per token."""

MANY = 24
"""The most skills and unlearned texts that are shown as columns of figures."""

LISTED = 8
"""How many skills are listed of a matrix with more than `MANY`."""


class MatrixTable:
    """A rich renderable of a matrix as it is now: print it, or show it by `Screen.live` while stages are measured."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the tables and notes; rich calls this."""
        is_whole = not is_large(self.matrix)
        yield self._losses() if is_whole else self._last_row()
        dim = ", earlier losses are dim" if is_whole else ""
        yield Text(f"*: just after learning; later changes are measured from here{dim}", style="dim")
        yield Text("-: not measured\n", style="dim")
        if self.matrix.stages:
            yield self._figures()

    def _losses(self) -> Table:
        matrix = self.matrix
        columns = [*matrix.skills, *matrix.unlearned]
        heads = [Text(column, "dim" if column in matrix.unlearned else "") for column in columns]
        table = Table("held-out loss, nats per token", ["after stage", *heads])
        table.add_row("base", *(_loss(matrix.base.get(column), "") for column in columns), style="dim")
        table.add_section()
        for place in range(len(matrix.stages)):
            table.add_row(stage_label(matrix, place), *(self._cell(place, column) for column in columns))
        return table

    def _cell(self, place: int, column: str) -> Text:
        loss, change = self.matrix.stages[place].losses.get(column), self.matrix.change(place, column)
        if place == self.matrix.learned_at(column):
            return _loss(loss, "bold", "*")
        if change is None:
            return _loss(loss, "dim")
        return _loss(loss, "" if abs(change) < NOTABLE else "green" if change < 0 else "red")

    def _last_row(self) -> Table:
        """The losses of some skills now, in rows: just learned ones, those that lost most, and unlearned texts."""
        matrix = self.matrix
        last = len(matrix.stages) - 1
        shown_skills = [*most_changed(matrix, LISTED), *matrix.unlearned] if matrix.stages else matrix.skills[:LISTED]
        listed = len([name for name in shown_skills if name in matrix.skills])
        title = f"held-out loss, nats per token: {listed} of {counted(len(matrix.skills), 'skill')}, the last learned "
        title += "first, then those that lost most"
        table = Table(title, ["skill", "base", "just after", "now", "change"])
        for name in shown_skills:
            learned = matrix.learned_at(name)
            after = None if learned is None else matrix.stages[learned].losses.get(name)
            change = matrix.change(last, name) if matrix.stages else None
            now = self._cell(last, name) if matrix.stages else _loss(None, "")
            moved = Text("-" if change is None else shown(change, "{:+.3f}"), now.style)
            table.add_row(name, _loss(matrix.base.get(name), ""), _loss(after, ""), now, moved)
        return table

    def _figures(self) -> Table:
        columns = ["figure", "mean", "worst", "worst skill", "skills counted"]
        table = Table("figures of the matrix", columns, words=["worst skill"])
        for row in figure_rows(self.matrix):
            table.add_row(row.title, row.mean, row.worst, row.worst_skill, row.num_counted)
        return table


def show_matrix(screen: Screen, matrix: Matrix) -> None:
    """Print the matrix and its figures."""
    screen.say(MatrixTable(matrix))


def is_large(matrix: Matrix) -> bool:
    """Whether a matrix has more skills and unlearned texts than are shown as columns of figures."""
    return len(matrix.skills) + len(matrix.unlearned) > MANY


def most_changed(matrix: Matrix, most: int) -> list[str]:
    """The skills that the last stage taught, then those that lost most since they were learned; not more than so
    many."""
    last = len(matrix.stages) - 1
    changes = {name: matrix.change(last, name) for name in matrix.skills}
    new = [name for name in matrix.skills if matrix.learned_at(name) == last]
    known = {name: value for name, value in changes.items() if value is not None and name not in new}
    by_loss = sorted(known, key=lambda name: -math.inf if math.isnan(known[name]) else -known[name])
    return [*new, *by_loss][:most]


class FigureRow(NamedTuple):
    """A figure in words."""

    name: str
    title: str
    mean: str
    worst: str
    worst_skill: str
    """The worst skill; empty where there is none."""
    num_counted: str
    """The number of skills that the mean is over, and of all."""

    @property
    def which(self) -> str:
        """The worst skill and the count in one phrase."""
        return f"{self.worst_skill}; {self.num_counted}" if self.worst_skill else self.num_counted


def figure_rows(matrix: Matrix) -> list[FigureRow]:
    """A row for each of `FIGURES`; those of unlearned text only if there is such text."""
    rows = []
    for name, kind in FIGURES.items():
        figure, all_of = kind.of(matrix), matrix.unlearned if name in OF_UNLEARNED else matrix.skills
        if name in OF_UNLEARNED and not all_of:
            continue
        worst = figure.worst
        count = f"{len(figure.known)} of {len(all_of)}"
        words = kind.show(figure.mean), kind.show(worst[1] if worst else None)
        if not figure.values:  # it applies to no skill
            words = "-", "-"
        rows.append(FigureRow(name, kind.title, *words, worst[0] if worst else "", count))
    return rows


def stage_label(matrix: Matrix, place: int) -> str:
    """The number and name of a stage, and its expert and action if they differ from what the name implies."""
    stage = matrix.stages[place]
    expert = stage.decision.get("expert")
    taken = "" if stage.has_trained else f" ({stage.decision['action']})"
    return f"{place + 1} {stage.name}" + (f" → {expert}" if expert not in (None, stage.name) else "") + taken


def _loss(value: float | None, style: str, mark: str = "") -> Text:
    text = "-" if value is None else shown(value, "{:.3f}")
    return Text(f"{text}{mark or ' '}", style="bold red" if text == "not finite" else style)
