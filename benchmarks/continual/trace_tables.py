"""Tables from the runs of trace.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from continual_tables import shown
from trace_tasks import TASKS

from dylo_moe.evaluation.loss_matrix import Matrix, Stage

Record = dict[str, Any]
Values = dict[str, float] | None


def is_stream(record: Record) -> bool:
    """Whether the run learns task after task."""
    return record["method"] not in ("base", "oracle", "joint")


def is_whole(record: Record) -> bool:
    """Whether all stages of the run are there."""
    return len(record["stages"]) == (len(record["order"]) if is_stream(record) else 1)


def points(record: Record) -> dict[str, float]:
    """Each task's own metric after the last stage."""
    return record["stages"][-1]["points"]


def transfer(record: Record) -> Values:
    """Backward transfer of each task but the last one: points after the last stage minus just after its own."""
    if not is_stream(record):
        return None
    stages = record["stages"]
    return {
        name: points(record)[name] - stages[place]["points"][name] for place, name in enumerate(record["order"][:-1])
    }


def losses(record: Record) -> dict[str, float]:
    """Nats per answer token of each task after the last stage."""
    return record["stages"][-1]["losses"]


def matrix(record: Record) -> Matrix:
    """The losses of all tasks after each stage, as `dylora stream` keeps them."""
    stages = [Stage(name, stage["losses"]) for name, stage in zip(record["order"], record["stages"], strict=True)]
    return Matrix(list(record["order"]), stages=stages)


def forgetting(record: Record) -> Values:
    """Nats per answer token of each task but the last one: after the last stage minus just after its own."""
    return matrix(record).forgetting().known if is_stream(record) else None


def routed(record: Record, kind: str) -> Values:
    """The share of a task's tokens of this kind that go to its own expert after the last stage."""
    found = record["stages"][-1].get("shares")
    return {name: part[kind] for name, part in found.items() if kind in part} if found else None


COLUMNS: dict[str, tuple[Callable[[Record], Values], Callable[[Sequence[float]], float], int]] = {
    "overall": (points, statistics.fmean, 1),
    "backward transfer": (transfer, statistics.fmean, 1),
    "worst task": (transfer, min, 1),
    "nats": (losses, statistics.fmean, 3),
    "forgot, nats": (forgetting, statistics.fmean, 3),
    "forgot, worst": (forgetting, max, 3),
}
"""Title to (values by task, what is made of them, digits)."""


def figure(record: Record, column: str) -> float | None:
    """One run's value of a column."""
    values, reduce, _ = COLUMNS[column]
    found = values(record)
    return reduce(list(found.values())) if found else None


def methods_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs by method."""
    methods: dict[str, list[Record]] = {}
    for record in records:
        methods.setdefault(record["method"], []).append(record)
    return methods


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = "|" + "---|" * len(titles)
    return "\n".join([f"| {' | '.join(titles)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def main_table(records: Sequence[Record]) -> str:
    """What the papers report, a method a line."""
    lines = []
    for method, found in methods_of(records).items():
        cells = [
            shown([value for record in found if (value := figure(record, name)) is not None], COLUMNS[name][2])
            for name in COLUMNS
        ]
        lines.append([method, str(len(found)), *cells])
    return table(["method", "runs", *COLUMNS], lines)


def table_by_task(records: Sequence[Record], values: Callable[[Record], Values], digits: int) -> str:
    """One value of each task, a method a line."""
    lines = []
    for method, found in methods_of(records).items():
        rows = [row for record in found if (row := values(record))]
        if rows:
            lines.append([method, *(shown([row[name] for row in rows if name in row], digits) for name in TASKS)])
    return table(["method", *TASKS], lines)


def matrix_table(record: Record) -> str:
    """Losses of all tasks after each stage of one run."""
    lines = [
        [f"after {name}", *(f"{stage['losses'][task]:.3f}" for task in record["order"])]
        for name, stage in zip(record["order"], record["stages"], strict=True)
    ]
    return table(["", *record["order"]], lines)


def decisions_table(record: Record) -> str:
    """What the library said of each task as it came."""
    lines = []
    for name, stage in zip(record["order"], record["stages"], strict=True):
        decision = stage["decision"]
        seen = "-" if decision["score"] is None else f"{decision['score']:.1f}"
        limit = "-" if decision["threshold"] is None else f"{decision['threshold']:.2f}"
        novel = "new" if decision["novel"] else "known"
        lines.append([name, novel, seen, limit, str(decision["nearest"] or "-"), f"{stage['grow_seconds']:.0f}"])
    return table(["task", "is", "score", "threshold", "nearest", "seconds to grow"], lines)


def print_tables(records: Sequence[Record]) -> None:
    """All tables of the runs that are whole, in Markdown."""
    records = [record for record in records if is_whole(record)]
    print("\nAfter the last task; mean ± 95 % t-interval over the runs (order x seed), of two runs both values.\n")
    print(main_table(records))
    print("\nEach task's own metric, 0 to 100:\n\n" + table_by_task(records, points, 1))
    print("\nBackward transfer, points:\n\n" + table_by_task(records, transfer, 1))
    print("\nNats per answer token:\n\n" + table_by_task(records, losses, 3))
    for kind in ("answers", "last prompt token", "all tokens"):
        print(f"\nShare that goes to the own expert, {kind}:\n")
        print(table_by_task(records, lambda record, kind=kind: routed(record, kind), 3))  # type: ignore[misc]
    for record in records:
        if is_stream(record) and record["seed"] == 0:
            print(
                f"\nNats per answer token of all tasks after each stage, {record['method']}:\n\n" + matrix_table(record)
            )
        if record["method"] in ("ours_token", "top1_token"):
            print(f"\nWhat the library said, seed {record['seed']}:\n\n" + decisions_table(record))


def summary(records: Sequence[Record]) -> list[Record]:
    """Every run's figures as values."""
    found = []
    for record in records:
        if is_whole(record):
            about = {name: record[name] for name in ("method", "order", "seed", "settings")}
            found.append(
                about | {"figures": {name: figure(record, name) for name in COLUMNS}, "points": points(record)}
            )
    return found
