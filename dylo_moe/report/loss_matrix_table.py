"""Show the loss matrix on a terminal of any width: a row for each stage, a column for each skill."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from dylo_moe.evaluation.loss_matrix import FIGURES, OF_UNLEARNED, Matrix, shown
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table

NOTABLE = 0.005
"""The smallest change that has a colour, in nats per token."""


class MatrixTable:
    """A rich renderable of a matrix as it is now: print it, or show it by `Screen.live` while stages are measured."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the tables and notes; rich calls this."""
        yield self._losses()
        yield Text("*: just after learning; later changes are measured from here, earlier losses are dim", style="dim")
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

    def _figures(self) -> Table:
        columns = ["figure", "mean", "worst", "worst skill", "skills counted"]
        table = Table("figures of the matrix", columns, words=["worst skill"])
        for row in figure_rows(self.matrix):
            table.add_row(row.title, row.mean, row.worst, row.worst_skill, row.num_counted)
        return table


def show_matrix(screen: Screen, matrix: Matrix) -> None:
    """Print the matrix and its figures."""
    screen.say(MatrixTable(matrix))


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
