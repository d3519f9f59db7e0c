"""Compare settings with those that something was begun with, and describe the differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """One setting whose value now differs from that before; None stands for no value."""

    name: str
    now: Any
    before: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.now!r}, was {self.before!r}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The settings whose values differ, sorted by name; the caller decides which of them may differ."""
    return [
        Difference(name, now.get(name), before.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def in_words(changed: Iterable[Difference]) -> str:
    """Describe all differences in one line."""
    return "; ".join(map(str, changed))
