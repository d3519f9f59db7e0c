"""The page about a comparison: the arms, their losses with intervals, and whether ours wins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dylo_moe.report.charts import Chart, colour_class, number
from dylo_moe.report.comparison_record import (
    LOSES,
    TIES,
    UNKNOWN,
    WINS,
    Bounded,
    Budget,
    ComparedArm,
    ComparisonRecord,
    Search,
    SearchedCell,
)
from dylo_moe.report.html import Cell, HtmlTable, page_link, render, settings_table, tinted
from dylo_moe.report.interval_charts import Measured, curve_chart, interval_chart
from dylo_moe.utils.redact import short_name, without_secrets

NATS = "nats per token"

VERDICTS = {WINS: ("ours wins", "good"), TIES: ("a tie", ""), LOSES: ("ours loses", "bad"), UNKNOWN: ("not known", "")}
"""Each verdict in words, and its CSS class."""

MIN_SCALE = 0.05
"""The smallest difference with the full tint, in nats per token, so that noise does not look like a result."""


def comparison_page(record: ComparisonRecord, home: Path) -> str:
    """The page about a comparison as HTML.

    Args:
        home: the folder that the page will be written to; links to the runs' pages are relative to it.
    """
    datasets = list(dict.fromkeys(name for arm in record.arms for name in arm.datasets))
    return render(
        "comparison.html.j2",
        title=f"DyLoRA-MoE comparison {record.name}",
        record=record,
        summary=_summary(record, datasets),
        searches=_searches(record.search),
        searched_rows=_searched_rows(record.search),
        curve=_curve(record.budgets),
        budgets=_budgets(record.budgets),
        mean_charts=_mean_charts(record.arms),
        arms=_arms(record),
        costs=_costs(record.arms),
        dataset_charts=[_loss_chart(record.arms, short_name(name), name) for name in datasets],
        losses=_losses(record.arms, datasets),
        differences=_differences(record.arms, datasets),
        trainings=_trainings(record, home),
        has_pages=any(item.page for of_seed in record.trainings.values() for item in of_seed.values()),
        configuration=settings_table(record.settings | record.evaluation),
    )


def _summary(record: ComparisonRecord, datasets: Sequence[str]) -> list[tuple[str, str]]:
    verdicts = [arm.verdict for arm in record.arms if arm.verdict is not None]
    trained = [tokens for arm in record.arms for tokens in arm.tokens if tokens]
    return [
        ("state", "finished" if record.is_finished else "not finished"),
        ("base", short_name(without_secrets(str(record.settings.get("model") or "not known")))),
        ("ours wins against", f"{verdicts.count(WINS):,} of {len(verdicts):,}" if verdicts else "not known"),
        ("ties", f"{verdicts.count(TIES):,}" if verdicts else "not known"),
        ("loses against", f"{verdicts.count(LOSES):,}" if verdicts else "not known"),
        ("seeds", ", ".join(record.seeds or record.trainings) or "not known"),
        ("datasets", f"{len(datasets):,}" if datasets else "not known"),
        ("training tokens per arm", f"{sum(trained) // len(trained):,}" if trained else "not known"),
        *([("cells of the grid", f"{_num_cells(record.search):,}")] if record.search else []),
        *([("budgets", f"{len(record.budgets):,}")] if record.budgets else []),
    ]


# The search, and the budgets.


class ArmSearch(NamedTuple):
    """The cells of one arm, at one budget."""

    title: str
    table: HtmlTable


def _num_cells(search: Search) -> int:
    return len({(cell.learning_rate, cell.scale) for cell in search.cells})


def _searched_rows(search: Search | None) -> str:
    """On which rows the grid was searched, in words."""
    if search is None:
        return ""
    rows = ", ".join(f"{short_name(name)} {count:,}" for name, count in search.rows.items())
    return f"{sum(search.rows.values()):,} rows ({rows}), with seed {search.seed}"


def _searches(search: Search | None) -> list[ArmSearch]:
    """Make a table for each arm and budget: a row for each scale, a column for each learning rate.

    A loss is tinted by how far it lies above the best of its arm, on one scale for all arms.
    """
    if search is None:
        return []
    groups: dict[tuple[int | None, str], list[SearchedCell]] = {}
    for cell in search.cells:
        groups.setdefault((cell.steps, cell.title), []).append(cell)
    lowest = {
        key: min((cell.loss for cell in cells if cell.loss is not None), default=0.0) for key, cells in groups.items()
    }
    above = [cell.loss - lowest[key] for key, cells in groups.items() for cell in cells if cell.loss is not None]
    several = len({steps for steps, _ in groups}) > 1
    return [
        ArmSearch(
            f"{title}, {key_steps:,} steps" if several and key_steps is not None else title,
            _cells_table(cells, lowest[key_steps, title], max([MIN_SCALE, *above])),
        )
        for (key_steps, title), cells in groups.items()
    ]


def _cells_table(cells: Sequence[SearchedCell], lowest: float, scale: float) -> HtmlTable:
    rates, scales = ([*dict.fromkeys(getattr(cell, name) for cell in cells)] for name in ("learning_rate", "scale"))
    found = {(cell.learning_rate, cell.scale): cell for cell in cells}
    rows = []
    for of_row in scales:
        row = [Cell("" if of_row is None else f"scale {number(of_row)}", "stage")]
        for rate in rates:
            cell = found.get((rate, of_row))
            if cell is None:
                row.append(Cell("not trained", "blank"))
            elif cell.loss is None:
                row.append(tinted(scale, scale, "diverged", hover="the training or its loss was not finite"))
            else:
                hover = (
                    "the best of this arm" if cell.is_best else f"{cell.loss - lowest:.4f} above the best of this arm"
                )
                kind = "learned" if cell.is_best else ""
                row.append(tinted(cell.loss - lowest, scale, f"{cell.loss:.4f}", hover=hover, kind=kind))
        rows.append(row)
    titles = ["its own rate" if rate is None else f"rate {number(rate)}" for rate in rates]
    return HtmlTable(["", *titles], rows, "cells")


def _curve(budgets: Sequence[Budget]) -> list[Chart]:
    """Draw the mean loss of each trained arm over the tokens of its budgets."""
    curves: dict[int, list[tuple[float, Measured]]] = {}
    for budget in budgets:
        for place, arm in enumerate(budget.arms):
            if arm.tokens and sum(arm.tokens):
                point = (sum(arm.tokens) / len(arm.tokens), Measured(arm.title, *arm.mean, place))
                curves.setdefault(place, []).append(point)
    return [curve_chart("mean over the datasets", list(curves.values()), unit=NATS, xlabel="tokens trained on")]


def _budgets(budgets: Sequence[Budget]) -> HtmlTable:
    """Make a table with a row for each arm and a column for each budget: the loss, and below it minus ours."""
    rows = []
    for place, arm in enumerate(budgets[-1].arms if budgets else []):
        row = [Cell(arm.title, "who", key=colour_class(place))]
        for budget in budgets:
            found = next((item for item in budget.arms if item.name == arm.name), None)
            lines = ["not measured" if found is None else f"{found.mean.value:.4f}"]
            if found is not None and found.difference is not None:
                lines.append(_with_ends(found.difference, "{:+.4f}").replace("\n", " "))
            row.append(Cell("\n".join(lines), "n"))
        rows.append(row)
    return HtmlTable(["arm", *(f"{budget.steps:,} steps" for budget in budgets)], rows)


# The arms.


def _mean_charts(arms: Sequence[ComparedArm]) -> list[Chart]:
    if not arms:
        return []
    differences = [
        Measured(arm.title, *arm.difference, place) for place, arm in enumerate(arms) if arm.difference is not None
    ]
    return [
        _loss_chart(arms, "mean over the datasets", None),
        interval_chart("minus ours", differences, unit=f"{NATS}; above 0: ours is better", mark=0.0),
    ]


def _loss_chart(arms: Sequence[ComparedArm], title: str, dataset: str | None) -> Chart:
    """Draw the loss of each arm with its interval, on one dataset or on all, and a line where ours is."""
    found = [arm.mean if dataset is None else arm.datasets.get(dataset) for arm in arms]
    rows = [
        Measured(arm.title, *loss, place)
        for place, (arm, loss) in enumerate(zip(arms, found, strict=True))
        if loss is not None
    ]
    ours = next((loss.value for arm, loss in zip(arms, found, strict=True) if arm.verdict is None and loss), None)
    return interval_chart(title, rows, unit=NATS, mark=ours)


def _arms(record: ComparisonRecord) -> HtmlTable:
    arms, several = record.arms, len(record.seeds) > 1
    tasks = list(dict.fromkeys(name for arm in arms for name in arm.pass_at_1))
    rows = []
    for place, arm in enumerate(arms):
        words, kind = VERDICTS.get(arm.verdict or "", ("", ""))
        cells = [
            Cell(arm.title, "who", key=colour_class(place), hover=arm.name),
            Cell(words, f"who {kind}".strip()),
            Cell(_with_ends(arm.mean, "{:.4f}"), "n"),
            *([Cell(_range(arm.by_seed, "{:.4f}"), "n")] if several else []),
            Cell("" if arm.difference is None else _with_ends(arm.difference, "{:+.4f}"), "n"),
            *([Cell(_range(arm.difference_by_seed, "{:+.4f}"), "n")] if several else []),
            *(Cell(_rates(arm.pass_at_1.get(task, [])), "n") for task in tasks),
        ]
        rows.append(cells)
    over_seeds = ["range over seeds"] if several else []
    titles = [
        "arm",
        "verdict",
        "mean loss",
        *over_seeds,
        "minus ours",
        *over_seeds,
        *(f"{task} pass@1" for task in tasks),
    ]
    return HtmlTable(titles, rows)


def _costs(arms: Sequence[ComparedArm]) -> HtmlTable:
    """Make a table of what each arm was trained with, and what it costs."""
    rows = []
    for place, arm in enumerate(arms):
        values = ["" if value is None else number(value) for value in (arm.learning_rate, arm.scale)]
        seconds = sum(arm.seconds) / (len(arm.seconds) or 1)
        tokens = sum(arm.tokens) // (len(arm.tokens) or 1)
        figures = [
            f"{arm.parameters:,}",
            f"{arm.active:,}",
            f"{tokens:,}",
            f"{seconds:,.0f}" if seconds else "",
            *values,
        ]
        rows.append([Cell(arm.title, "who", key=colour_class(place)), *(Cell(text, "n") for text in figures)])
    return HtmlTable(["arm", "parameters", "of one token", "tokens", "seconds", "learning rate", "scale"], rows)


def _losses(arms: Sequence[ComparedArm], datasets: Sequence[str]) -> HtmlTable:
    rows = []
    for place, arm in enumerate(arms):
        found = [arm.datasets.get(name) for name in datasets]
        cells = [Cell("not measured" if loss is None else _with_ends(loss, "{:.4f}"), "n") for loss in found]
        rows.append([Cell(arm.title, "who", key=colour_class(place)), *cells])
    return HtmlTable(["arm", *map(short_name, datasets)], rows)


def _differences(arms: Sequence[ComparedArm], datasets: Sequence[str]) -> HtmlTable:
    """A table of each arm's loss minus ours, tinted where the interval does not hold 0."""
    values = [abs(item.value) for arm in arms for item in arm.differences.values()]
    scale, rows = max([MIN_SCALE, *values]), []
    for place, arm in enumerate(arms):
        if arm.difference is None:
            continue
        cells = [Cell(arm.title, "who", key=colour_class(place))]
        for name in datasets:
            item = arm.differences.get(name)
            if item is None:
                cells.append(Cell("not measured", "n"))
                continue
            text, is_sure = _with_ends(item, "{:+.4f}"), item.ends is not None and item.ends[0] * item.ends[1] > 0
            hover = f"{arm.title} minus ours on {name}"
            cells.append(tinted(item.value, scale, text, hover=hover) if is_sure else Cell(text, "n", hover=hover))
        rows.append(cells)
    return HtmlTable(["arm", *map(short_name, datasets)], rows)


def _trainings(record: ComparisonRecord, home: Path) -> HtmlTable:
    rows = []
    for seed, of_seed in record.trainings.items():
        cells = [
            Cell(item.state) if item.page is None else Cell(f"{item.state}: page", link=page_link(item.page, home))
            for item in of_seed.values()
        ]
        rows.append([Cell(seed, "stage"), *cells])
    return HtmlTable(["seed", *next(iter(record.trainings.values()), {})], rows)


def _with_ends(item: Bounded, form: str) -> str:
    """A figure, and in a second line its interval."""
    ends = "not known" if item.ends is None else ", ".join(form.format(end) for end in item.ends)
    return f"{form.format(item.value)}\n[{ends}]"


def _range(values: Sequence[float], form: str) -> str:
    return f"{form.format(min(values))} to\n{form.format(max(values))}" if values else ""


def _rates(rates: Sequence[Bounded]) -> str:
    """The mean pass rate over seeds with its range; for one seed with its interval over tasks."""
    values = [rate.value for rate in rates]
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.1%}"
    if len(values) > 1:
        return f"{mean}\n({min(values):.1%} to {max(values):.1%})"
    ends = rates[0].ends
    return f"{mean}\n[not known]" if ends is None else f"{mean}\n[{ends[0]:.1%}, {ends[1]:.1%}]"
