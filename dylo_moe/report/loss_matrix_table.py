"""Show the loss matrix on a terminal of any width: a row for each stage, a column for each skill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from dylo_moe.evaluation.loss_matrix import FIGURES, OF_UNLEARNED, Matrix, shown

NOTABLE = 0.005
"""The smallest change that has a colour, in nats per token."""

MIN_WIDTH, MAX_WIDTH, MIN_LABEL_WIDTH, MAX_LABEL_WIDTH = 8, 10, 11, 28
"""The widths of a skill's column and of that of the stages, in letters; longer names continue in the next line."""

GAP = 3
"""The number of letters that a column takes in addition to its width."""

NARROW = 64
"""The width in letters below which a terminal shows the worst skill under a figure's name, not beside its value."""


class MatrixTable:
    """A rich renderable of a matrix as it is now: print it, or give it to `rich.live.Live` after each stage.

    If the terminal is too narrow for all skills, there are several tables, one below the other, so that no number is
    cut."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the tables and notes; rich calls this."""
        matrix = self.matrix
        labels = ["base", *(stage_label(matrix, place) for place in range(len(matrix.stages)))]
        longest = min(max(len(label) for label in labels), MAX_LABEL_WIDTH, options.max_width // 3)
        width = max(longest, MIN_LABEL_WIDTH)
        yield Text("Held-out loss, nats per token", style="italic")
        columns: list[str] = []
        for column in [*matrix.skills, *matrix.unlearned]:
            if columns and sum(_width(name) + GAP for name in [*columns, column]) + width + GAP > options.max_width:
                yield self._losses(columns, labels, width)
                columns = []
            columns.append(column)
        yield self._losses(columns, labels, width)
        yield Text("*: just after learning; later changes are measured from here, earlier losses are dim", style="dim")
        yield Text("-: not measured", style="dim")
        if matrix.stages:
            yield Text("\nFigures", style="italic")
            yield self._figures(options.max_width < NARROW)

    def _losses(self, columns: Sequence[str], labels: Sequence[str], width: int) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("after stage", width=width, overflow="fold")
        for column in columns:
            style = "dim" if column in self.matrix.unlearned else ""
            table.add_column(Text(column, style), width=_width(column), justify="right", overflow="fold")
        table.add_row(labels[0], *(_loss(self.matrix.base.get(column), "") for column in columns), style="dim")
        table.add_section()
        for place in range(len(self.matrix.stages)):
            table.add_row(Text(labels[place + 1]), *(self._cell(place, column) for column in columns))
        return table

    def _cell(self, place: int, column: str) -> Text:
        loss, change = self.matrix.stages[place].losses.get(column), self.matrix.change(place, column)
        if place == self.matrix.learned_at(column):
            return _loss(loss, "bold", "*")
        if change is None:
            return _loss(loss, "dim")
        return _loss(loss, "" if abs(change) < NOTABLE else "green" if change < 0 else "red")

    def _figures(self, is_narrow: bool) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", overflow="fold")
        for title in ("mean", "worst"):
            table.add_column(title, justify="right", no_wrap=True)
        if not is_narrow:
            table.add_column("worst skill; skills counted", overflow="fold")
        for row in figure_rows(self.matrix):
            below = [Text(f"{row.title} ({row.which})")] if is_narrow else [row.title]
            numbers = (text.replace(" ", "\n") if is_narrow else text for text in (row.mean, row.worst))
            table.add_row(*below, *numbers, *([] if is_narrow else [Text(row.which)]))
        return table


def show_matrix(console: Console, matrix: Matrix) -> None:
    """Print the matrix and its figures."""
    console.print(MatrixTable(matrix))


class FigureRow(NamedTuple):
    """A figure in words."""

    name: str
    title: str
    mean: str
    worst: str
    which: str
    """The worst skill, and the number of skills that the mean is over."""


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
        rows.append(FigureRow(name, kind.title, *words, f"{worst[0]}; {count}" if worst else count))
    return rows


def stage_label(matrix: Matrix, place: int) -> str:
    """The number and name of a stage, and its expert and action if they differ from what the name implies."""
    stage = matrix.stages[place]
    expert = stage.decision.get("expert")
    taken = "" if stage.has_trained else f" ({stage.decision['action']})"
    return f"{place + 1} {stage.name}" + (f" → {expert}" if expert not in (None, stage.name) else "") + taken


def _width(column: str) -> int:
    return min(max(len(column), MIN_WIDTH), MAX_WIDTH)


def _loss(value: float | None, style: str, mark: str = "") -> Text:
    text = "-" if value is None else shown(value, "{:.3f}")
    return Text(f"{text}{mark or ' '}", style="bold red" if text == "not finite" else style)
