"""Settings that are not those which something was begun with, by name, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """One setting that has another value now than before; None where it had or has none."""

    name: str
    now: Any
    before: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.now!r}, was {self.before!r}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The settings whose values differ, sorted by name; which of them may differ is for the caller to say."""
    return [
        Difference(name, now.get(name), before.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def in_words(changed: Iterable[Difference]) -> str:
    """All of them in one line."""
    return "; ".join(map(str, changed))
