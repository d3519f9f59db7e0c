"""Checks of single values that several config classes share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The numbers that a setting may have; they are finite."""

    least: float
    below: float = math.inf
    """The smallest number that is too large."""
    is_open: bool = False
    """Whether `least` itself is too small."""
    is_whole: bool = False
    """Whether only whole numbers count."""
    most: float = math.inf
    """The largest number that is not too large."""

    def holds(self, value: Any) -> bool:
        """Whether a value is one of these numbers."""
        if not is_number(value) or not math.isfinite(value) or (self.is_whole and value != int(value)):
            return False
        return (
            (value > self.least if self.is_open else value >= self.least) and value < self.below and value <= self.most
        )

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a finite number"
        lower = f"above {self.least:g}" if self.is_open else f"of at least {self.least:g}"
        uppers = {"below": self.below, "at most": self.most}
        return f"{kind} {lower}" + "".join(f" and {how} {bound:,}" for how, bound in uppers.items() if bound < math.inf)


COUNT = Range(1, is_whole=True)

COUNT_OR_NONE = Range(0, is_whole=True)
"""A count of something that may be left out, of which 0 is none."""

POSITIVE = Range(0, is_open=True)

NOT_NEGATIVE = Range(0)

SHARE_BELOW_ONE = Range(0, below=1)

PERCENT = Range(0, is_open=True, most=100)

SEED = Range(0, below=2**32, is_whole=True)
"""The seeds that every library here takes; NumPy's must be below 2**32."""


def range_problems(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> list[str]:
    """The problems of those values that have a range; a value that is absent or None has none."""
    return [
        f"{name} is {values[name]!r}; it must be {allowed}"
        for name, allowed in ranges.items()
        if values.get(name) is not None and not allowed.holds(values[name])
    ]


def is_share(text: str) -> bool:
    """Whether a text is a number between 0 and 1, both excluded."""
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; a bool does not count."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choice_problems(config: Any) -> list[str]:
    """The problems of those fields of a dataclass whose metadata lists "choices"."""
    problems = []
    for item in fields(config):
        choices, value = item.metadata.get("choices"), getattr(config, item.name)
        if choices is not None and value not in choices:
            *others, last = map(repr, choices)
            problems.append(f"{item.name} is {value!r}; it must be {', '.join(others)} or {last}")
    return problems
