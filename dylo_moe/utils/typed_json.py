"""JSON that somebody else may have altered: read without a traceback, checked by types, and hashed by its content."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from dylo_moe.utils.checks import is_number

LARGEST = 2**63
"""Whole numbers from here on are no counts of anything."""

NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number", type(None): "null"}

LISTS = (list, tuple, set, frozenset, Sequence, Collection, Iterable, AbstractSet)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: for whatever is no JSON, is nested too deeply, or has a number that is too long.
        OSError: where it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def checksum(values: Mapping[str, Any], *, leave_out: str) -> str:
    """The sha256 of a JSON object's content without one entry, whatever the order of its keys and its white space.

    Raises:
        ValueError: for a content that is nested too deeply.
    """
    content = {name: value for name, value in values.items() if name != leave_out}
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def field_problems(cls: type, values: Any, where: str, *, is_open: bool = False) -> list[str]:
    """What is wrong with the values of a dataclass as JSON has them: types, unknown fields, and absent ones.

    Args:
        cls: the dataclass; a field of a type that JSON does not have may hold anything.
        where: what the values are, in the messages.
        is_open: whether other fields than those of the dataclass may be there.
    """
    if not isinstance(values, dict):
        return [f"{where} is {shown(values)}; it must be an object"]
    hints, known = typing.get_type_hints(cls), [item for item in fields(cls) if item.init]
    problems = [
        f"{where} lacks {item.name}"
        for item in known
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING
    ]
    if not is_open:
        unknown = values.keys() - {item.name for item in known}
        problems += [f"{where} has {shown(name)}, which is unknown here" for name in sorted(unknown)]
    for item in known:
        if item.name in values:
            problems += type_problems(values[item.name], hints[item.name], f"{where}.{item.name}")
    return problems


def type_problems(value: Any, wanted: Any, where: str) -> list[str]:
    """What is wrong with a value as JSON has it for a type hint; lists stand for tuples and sets too."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    kind = origin or wanted
    inner: list[tuple[Any, Any, str]] = []
    if origin in (Union, types.UnionType):
        fits = any(not type_problems(value, choice, where) for choice in arguments)
    elif origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in arguments)
    elif kind in NAMES:
        fits = _is_plain(value, kind)
    elif kind in LISTS:
        fits = isinstance(value, (list, tuple))
        if fits and arguments:
            inner = [(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value)]
    elif kind in (dict, Mapping):
        fits = isinstance(value, dict)
        if fits and arguments:
            inner = [(item, arguments[1], f"{where}.{shown(name)}") for name, item in value.items()]
    elif is_dataclass(kind) and isinstance(kind, type):
        return field_problems(kind, value, where)
    else:
        fits = isinstance(value, str) or not (isinstance(kind, type) and issubclass(kind, Enum))
    if not fits:
        return [f"{where} is {shown(value)}; it must be {in_words(wanted)}"]
    return [problem for item in inner for problem in type_problems(*item)]


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is float:
        return is_number(value) and abs(value) < LARGEST * 1e280 and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    return isinstance(value, kind)


def in_words(wanted: Any) -> str:
    """A type hint in words."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(in_words, arguments)))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    kind = origin or wanted
    if kind in NAMES:
        return NAMES[kind]
    return "a list" if kind in LISTS else "a text" if isinstance(kind, type) and issubclass(kind, Enum) else "an object"


def shown(value: Any) -> str:
    """A value for a message, cut to a bounded length."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
