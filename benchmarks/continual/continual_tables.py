"""Tables from the records of continual.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, 97.5 %, for 1, 2, ... degrees of freedom."""

Record = dict[str, Any]


def interval(values: Sequence[float]) -> dict[str, float | int]:
    """Mean, and half the width of the 95 % t-interval (0 with a single value)."""
    half = 0.0
    if len(values) > 1:
        t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96
        half = t * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "half_width": half, "runs": len(values)}


def shown(values: Iterable[float], digits: int = 3) -> str:
    """`mean ± half`; with two runs both values, because their t-interval says nothing; nothing as a dash."""
    values = list(values)
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    if len(values) == 2:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
    found = interval(values)
    return f"{found['mean']:.{digits}f} ± {found['half_width']:.{digits}f}"


class Comparison:
    """The records of all methods beside the base and the oracle of the same seed.

    Args:
        records: as continual.py writes them.
        skills: those that are learned, in the order of the columns.
        unlearned: kinds of text that nobody trains on.
    """

    def __init__(self, records: Sequence[Record], skills: Sequence[str], unlearned: Sequence[str]) -> None:
        self.skills, self.unlearned = tuple(skills), tuple(unlearned)
        self.methods: dict[str, list[Record]] = {}
        for record in records:
            self.methods.setdefault(record["method"], []).append(record)
        self.base = self.methods["base"][0]["losses"]
        self.oracles = {record["seed"]: record["losses"] for record in self.methods.get("oracle", [])}

    def kept(self, record: Record) -> dict[str, float] | None:
        """Of each skill, the share of the oracle's gain: (base - final) / (base - oracle)."""
        oracle = self.oracles.get(record["seed"])
        if oracle is None or record["method"] == "base":
            return None
        return {
            name: (self.base[name] - record["losses"][name]) / (self.base[name] - oracle[name]) for name in self.skills
        }

    def forgot(self, record: Record) -> dict[str, float] | None:
        """Of each skill, nats per token: final minus just after it was learned."""
        learned = record.get("learned")
        return None if learned is None else {name: record["losses"][name] - learned[name] for name in self.skills}

    def figures(self, method: str) -> dict[str, list[float]]:
        """A method's figures, one value a run."""
        records = self.methods[method]
        kept = [found for record in records if (found := self.kept(record))]
        forgot = [found for record in records if (found := self.forgot(record))]
        figures = {
            "kept, mean": [statistics.fmean(found.values()) for found in kept],
            "kept, worst skill": [min(found.values()) for found in kept],
            "forgot, worst skill": [max(found.values()) for found in forgot],
        }
        for name in self.unlearned:
            figures[f"{name} minus base"] = [record["losses"][name] - self.base[name] for record in records]
        return figures

    def main_table(self) -> str:
        """What the issue asks for, a method a line."""
        columns = list(self.figures("base"))
        lines = [f"| method | runs | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
        for method, records in self.methods.items():
            cells = [shown(values) for values in self.figures(method).values()]
            lines.append(f"| {method} | {len(records)} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def table_by_skill(self, value: Callable[[Record], dict[str, float] | None], columns: Sequence[str]) -> str:
        """One value of each skill, a method a line."""
        lines = [f"| method | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        for method, records in self.methods.items():
            found = [row for record in records if (row := value(record))]
            if found:
                cells = [shown([row[name] for row in found if name in row]) for name in columns]
                lines.append(f"| {method} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def print(self) -> None:
        """All tables, in Markdown."""
        print("\nAfter the whole stream: mean ± 95 % t-interval over the runs (order x seed); of two runs both values.")
        print("The worst skill is the worst one of each run.\n")
        print(self.main_table())
        texts = (*self.skills, *self.unlearned)
        print("\nFinal loss, nats per token:\n\n" + self.table_by_skill(lambda record: record["losses"], texts))
        alone = self.table_by_skill(lambda record: record.get("alone"), self.skills)
        print("\nFinal loss with each skill's own expert forced:\n\n" + alone)
        print("\nShare of the oracle's gain kept:\n\n" + self.table_by_skill(self.kept, self.skills))
        print("\nForgot, nats per token:\n\n" + self.table_by_skill(self.forgot, self.skills))
        routed = self.table_by_skill(lambda record: record.get("accuracy"), texts)
        print("\nShare of held-out tokens sent to their own expert (text of no skill: to the base):\n\n" + routed)
        print("\nThe same by the token's place in its text, all skills:\n")
        spans: dict[str, float] = next((record["spans"] for record in self.methods.get("ours", [])), {})
        print(self.table_by_skill(lambda record: record.get("spans"), list(spans)))
        print("\nWhat routing costs there, nats per token more than with the own expert forced:\n")
        print(self.table_by_skill(lambda record: record.get("costs"), list(spans)))
        found = [record["after_switch"] for record in self.methods.get("ours", [])]
        values = [shown(record[kind] for record in found) for kind in ("switched", "alone")]
        print(f"\nTokens 32-160 of a skill sent right by ours: after 768 of another {values[0]}, alone {values[1]}")

    def summary(self) -> dict[str, Any]:
        """The main table as values."""
        return {
            method: {
                name: interval(values) | {"values": values} for name, values in self.figures(method).items() if values
            }
            for method in self.methods
        }


def pair_table(records: Sequence[Record]) -> str:
    """What the router loses on two skills alike in words, and what the wrong expert would cost."""
    names = records[0]["order"]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    rows = {
        "base": "base",
        "the other one's expert": "other",
        "routed": "losses",
        "its own expert": "alone",
        "share of tokens sent to its own expert": "accuracy",
    }
    for label, key in rows.items():
        lines.append(f"| {label} | {' | '.join(shown(record[key][name] for record in records) for name in names)} |")
    for label, key in (("confusing them costs", "other"), ("the router loses", "losses")):
        costs = [shown(record[key][name] - record["alone"][name] for record in records) for name in names]
        lines.append(f"| {label} | {' | '.join(costs)} |")
    return "\n".join(lines)
