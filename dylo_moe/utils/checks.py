"""Checks of single values that several config classes share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


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
