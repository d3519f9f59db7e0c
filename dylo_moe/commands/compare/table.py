"""The result of a comparison: a line for each arm, its difference from ours, and whether ours wins, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dylo_moe.commands.compare.arguments import ARMS, BASE_ARM, OURS
from dylo_moe.commands.compare.grid import OWN_CELL, Cell
from dylo_moe.evaluation.losses import Estimate, Estimates, Losses, estimates, mean_loss
from dylo_moe.report.comparison_record import LOSES, TIES, UNKNOWN, WINS
from dylo_moe.utils.markdown import Markdown, markdown_table
from dylo_moe.utils.table import Table


class Rate(NamedTuple):
    """The pass@1 of one run's greedy answers, a fraction, with its interval over tasks."""

    value: float
    interval: list[float] | None


class ArmRun(NamedTuple):
    """The figures of one arm, trained with one seed and evaluated."""

    losses: Losses
    """The losses of the seed's held-out rows."""
    parameters: int
    """The number of trained parameters: those of the adapters, and of the gate where it is trained."""
    active: int
    """The number of trained parameters that one token uses."""
    tokens: int
    """The number of real tokens that the arm was trained on."""
    pass_at_1: dict[str, Rate]
    """The pass rate of each benchmark."""
    seconds: float = 0.0
    """The seconds of the training's steps, without evaluations and saving."""
    cell: Cell = OWN_CELL
    """The learning rate and the scale that it was trained with; empty for the base."""


class ArmLine(NamedTuple):
    """The figures of one arm over all seeds; lists have a value for each seed."""

    arm: str
    parameters: int
    active: int
    tokens: list[int]
    losses: Estimates
    """The losses, pooled over seeds."""
    difference: Estimates | None
    """This arm's losses minus ours, row by row; None for ours itself."""
    by_seed: list[float]
    """The arm's mean loss over datasets, for each seed."""
    difference_by_seed: list[float]
    """This arm's mean loss minus ours, for each seed; empty for ours itself."""
    pass_at_1: dict[str, list[Rate]]
    seconds: list[float]
    cell: Cell
    """The learning rate and the scale of the arm's adapters; empty for the base."""

    @property
    def verdict(self) -> str | None:
        """The verdict on our model against this arm, by the mean loss; None for ours itself."""
        if self.difference is None:
            return None
        interval = self.difference.mean.interval
        if math.isnan(interval.low):
            return UNKNOWN
        return TIES if not interval.excludes_zero else WINS if interval.low > 0 else LOSES


def make_lines(runs: Mapping[str, Sequence[ArmRun]], *, seed: int = 0) -> list[ArmLine]:
    """Make the lines of the table, in the order of `ARMS`.

    Args:
        runs: the runs of each arm, ours included, in the order of the seeds.
        seed: the seed of the resampling.

    Raises:
        ValueError: for arms that were trained on different numbers of tokens, or measured on different rows.
    """
    ours = runs[OURS]
    lines = []
    for arm in [arm for arm in ARMS if arm in runs]:
        mine = runs[arm]
        if arm != BASE_ARM and [run.tokens for run in mine] != [run.tokens for run in ours]:
            raise ValueError(
                f"{arm} was trained on {[run.tokens for run in mine]} tokens and {OURS} on "
                f"{[run.tokens for run in ours]}; they cannot be compared"
            )
        losses = [run.losses for run in mine]
        means = [mean_loss(one) for one in losses]
        difference = None if arm == OURS else estimates(losses, [run.losses for run in ours], seed=seed)
        of_ours = [mean_loss(run.losses) for run in ours]
        rates = {name: [run.pass_at_1[name] for run in mine] for name in mine[0].pass_at_1}
        lines.append(
            ArmLine(
                arm,
                mine[0].parameters,
                mine[0].active,
                [run.tokens for run in mine],
                estimates(losses, seed=seed),
                difference,
                means,
                [] if arm == OURS else [one - other for one, other in zip(means, of_ours, strict=True)],
                rates,
                [run.seconds for run in mine],
                mine[0].cell,
            )
        )
    return lines


def sentences(lines: Sequence[ArmLine], seeds: Sequence[int]) -> list[str]:
    """Put the table into words: a sentence for each arm, a conclusion, and what the intervals mean."""
    found = [_sentence(line, len(seeds)) for line in lines if line.difference is not None]
    others = [ARMS[line.arm] for line in lines if line.verdict not in (None, WINS)]
    if others:
        names = ", ".join(others[:-1]) + f" and {others[-1]}" if len(others) > 1 else others[0]
        found.append(f"Overall, ours does not win: it does not beat {names}.")
    else:
        found.append("Overall, ours wins against everything that it was compared with.")
    left_out = [title for arm, title in ARMS.items() if arm not in {line.arm for line in lines}]
    if left_out:
        found.append(f"Not compared with: {', '.join(left_out)}.")
    unit = lines[0].losses.mean
    several = len(seeds) > 1
    runs = f"{len(seeds)} runs (seeds {', '.join(map(str, seeds))})" if several else f"one run (seed {seeds[0]})"
    other = "turn out: for that see the range over seeds" if several else "turn out, which one seed cannot show"
    found.append(
        "Losses are in nats per token; the mean counts every dataset alike. The 95 % intervals are from resampling the "
        f"{unit.num_units:,} held-out {unit.unit} of {runs}, within each run; differences are taken row by row. They "
        f"say how sure the figures are for these trained models on text like this, not how another seed would {other}."
    )
    return found


def _sentence(line: ArmLine, num_seeds: int) -> str:
    assert line.difference is not None
    item, title = line.difference.mean, ARMS[line.arm]
    if line.verdict == UNKNOWN:
        return f"Against {title}: nothing can be said, because a dataset has only one held-out row."
    size = f"{abs(item.value):.4f} nats per token"
    ends = f"95 % interval of the difference {item.interval.low:+.4f} to {item.interval.high:+.4f}"
    agreeing = sum(math.copysign(1, value) == math.copysign(1, item.value) for value in line.difference_by_seed)
    seeds = f"; the same sign in {agreeing} of {num_seeds} seeds" if num_seeds > 1 else ""
    if line.verdict == TIES:
        return f"Against {title}, ours ties: the interval holds 0 ({ends}{seeds})."
    if line.verdict == WINS:
        return f"Against {title}, ours wins: its mean loss is {size} lower ({ends}{seeds})."
    return f"Against {title}, ours loses: its mean loss is {size} higher ({ends}{seeds})."


# The table as rows of cells, for a terminal and for Markdown.


def header(lines: Sequence[ArmLine]) -> list[str]:
    """List the titles of the table's columns."""
    several = len(lines[0].by_seed) > 1
    return [
        "arm",
        "parameters",
        "active",
        "tokens",
        *(["rate", "scale", "seconds"] if _has_cells(lines) else []),
        *lines[0].losses.datasets,
        "mean",
        *(["range over seeds"] if several else []),
        "minus ours",
        *(["range over seeds"] if several else []),
        *(f"{name} pass@1" for name in lines[0].pass_at_1),
    ]


def _has_cells(lines: Sequence[ArmLine]) -> bool:
    """Whether it is known how the arms were trained."""
    return any(line.cell != OWN_CELL for line in lines)


def cells(line: ArmLine, *, with_cell: bool = False) -> list[list[str]]:
    """List the cells of a line, each of one or two parts: a figure, and its interval or range.

    Args:
        with_cell: whether the table has columns for learning rate, scale and seconds.
    """
    several = len(line.by_seed) > 1
    own = [_figure(item, "{:.3f}") for item in (*line.losses.datasets.values(), line.losses.mean)]
    difference = [["-"]] if line.difference is None else [_figure(line.difference.mean, "{:+.4f}")]
    rates = [_rates(values) for values in line.pass_at_1.values()]
    return [
        [ARMS[line.arm]],
        [f"{line.parameters:,}"],
        [f"{line.active:,}"],
        [f"{sum(line.tokens) // len(line.tokens):,}"],
        *(_trained_with(line) if with_cell else []),
        *own,
        *([_range(line.by_seed, "{:.3f}")] if several else []),
        *difference,
        *([_range(line.difference_by_seed, "{:+.4f}")] if several else []),
        *rates,
    ]


def _trained_with(line: ArmLine) -> list[list[str]]:
    values = ["-" if value is None else f"{value:.4g}" for value in line.cell]
    seconds = sum(line.seconds) / len(line.seconds)
    return [*([value] for value in values), [f"{seconds:,.0f}" if seconds else "-"]]


def _figure(item: Estimate, form: str) -> list[str]:
    ends = item.interval.as_json()
    return [
        form.format(item.value),
        "not known" if ends is None else f"[{', '.join(form.format(end) for end in ends)}]",
    ]


def _range(values: Sequence[float], form: str) -> list[str]:
    return [" to ".join(form.format(end) for end in (min(values), max(values)))] if values else ["-"]


def _rates(rates: Sequence[Rate]) -> list[str]:
    """Write the mean pass rate over seeds and its range; for one seed, its interval over tasks."""
    values = [rate.value for rate in rates]
    mean = f"{sum(values) / len(values):.1%}"
    if len(rates) > 1:
        return [mean, f"({min(values):.1%} to {max(values):.1%})"]
    ends = rates[0].interval
    return [mean, "not known" if ends is None else f"[{ends[0]:.1%}, {ends[1]:.1%}]"]


def as_table(lines: Sequence[ArmLine], prefix: str = "") -> Table:
    """Make the table for a terminal.

    Args:
        prefix: what stands before the title, such as a budget.
    """
    table = Table(f"{prefix}held-out loss, nats per token, with 95 % intervals", header(lines))
    for line in lines:
        parts_of_cells = cells(line, with_cell=_has_cells(lines))
        table.add_row(*(tuple(parts) for parts in parts_of_cells), style="bold" if line.arm == OURS else "")
    return table


def as_markdown(lines: Sequence[ArmLine], said: Sequence[str]) -> str:
    """Write the table as Markdown, with the sentences below it."""
    titles, rows = header(lines), []
    for line in lines:
        texts = [" ".join(parts) for parts in cells(line, with_cell=_has_cells(lines))]
        rows.append([Markdown(f"**{text}**" if line.arm == OURS else text) for text in texts])
    table = markdown_table(titles, rows, right=range(1, len(titles)))
    return "\n".join([table, "", *(f"- {text}" for text in said)]) + "\n"


def as_json(lines: Sequence[ArmLine], said: Sequence[str]) -> dict[str, Any]:
    """Write the lines and the sentences as JSON values."""
    return {
        "unit": "nats per token",
        "level": 0.95,
        "arms": lines_json(lines),
        "sentences": list(said),
    }


def lines_json(lines: Sequence[ArmLine]) -> dict[str, Any]:
    """Write the lines as JSON values, by arm."""
    return {
        line.arm: {
            **line._asdict(),
            "title": ARMS[line.arm],
            "losses": line.losses.as_json(),
            "difference": None if line.difference is None else line.difference.as_json(),
            "ours": line.verdict,
            "cell": line.cell._asdict(),
        }
        for line in lines
    }
