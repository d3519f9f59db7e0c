"""The flags of a config class: one for each field, declared where the field is.

A field's metadata holds what argparse takes (help, choices, aliases), and, where the flag differs from the field:

    flag    the flag's name, where it is not the field's own; None where the field has no flag
    read    the function that makes a value from typed text, where a field takes values of several types

A recipe and the settings of a run hold the value of a field with `read` as text, as it is typed.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Any, TypeVar, get_type_hints

Config = TypeVar("Config")

OUR_KEYS = ("flag", "read")
"""Keys of the metadata that argparse does not know."""


def flags_of(kind: Any) -> dict[str, Field[Any]]:
    """The fields of a dataclass, or of an instance of one, that have a flag, each under its flag's name."""
    named = [(item.metadata.get("flag", item.name), item) for item in fields(kind)]
    return {flag: item for flag, item in named if flag is not None}


def values_of(config: Any) -> dict[str, Any]:
    """The values of a config, each under its flag's name and as it is typed."""
    return {flag: as_typed(item, getattr(config, item.name)) for flag, item in flags_of(config).items()}


def as_typed(item: Field[Any], value: Any) -> Any:
    """The value of a field as recipes hold it; two spellings of one value (0.5 and 0.50) become the same."""
    return str(item.metadata["read"](str(value))) if "read" in item.metadata else value


def config_from(kind: type[Config], values: dict[str, Any]) -> Config:
    """Make a config from the values of its flags, each under the flag's name, as argparse read it."""
    given = {item.name: (flag, item) for flag, item in flags_of(kind).items() if item.init and flag in values}
    return kind(**{name: item.metadata.get("read", _as_is)(values[flag]) for name, (flag, item) in given.items()})


def flags_class(kind: type) -> type:
    """The dataclass from which `HfArgumentParser` makes the flags of `kind`: the parser names each flag after a field,
    and passes all of the field's metadata to argparse.

    Returns:
        `kind` itself where its flags are its fields.
    """
    if not any(key in item.metadata for item in fields(kind) for key in OUR_KEYS):
        return kind
    types = get_type_hints(kind)
    members = []
    for flag, item in flags_of(kind).items():
        metadata = {key: value for key, value in item.metadata.items() if key not in OUR_KEYS}
        default = item.default if item.default is MISSING else as_typed(item, item.default)
        options: Any = {"default": default, "default_factory": item.default_factory, "metadata": metadata}
        members.append((flag, str if "read" in item.metadata else types[item.name], field(**options)))
    return make_dataclass(f"{kind.__name__}Flags", members, kw_only=True)


def _as_is(value: Any) -> Any:
    return value
