"""The help of a command, printed without the imports that take seconds.

A parser is made by Transformers' `HfArgumentParser`, and importing that and the Trainer's arguments takes seconds. The
help needs neither: our flags are fields of dataclasses that import next to nothing, and the Trainer's flags and their
defaults are read from `trainer_flags.json`, which `python -m dylo_moe.parsing.record_flags` writes; their texts are in
`trainer_texts.py`. Where the installed version of Transformers is not the recorded one, the command makes its parser to
print the help. tests/parsing/test_help.py checks that both ways print the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from dylo_moe.parsing.command_line import SHOWN_FLAGS, CommandLine
from dylo_moe.parsing.flags import flags_class
from dylo_moe.parsing.help_format import default_in_words, sort_into_sections
from dylo_moe.parsing.trainer_texts import TRAINER_TEXTS

RECORD = Path(__file__).parent / "trainer_flags.json"
"""The Trainer's flags that a help shows, and the version of Transformers that has them."""


class HelpEntry(NamedTuple):
    """One entry of a command's help: a flag, with its values, its default and its text."""

    name: str
    """The flag's name without dashes, by which a `Refusal` refers to it."""
    options: list[str]
    """The spellings that can be typed: the flag with its dashes, and its aliases."""
    nargs: str | int | None
    """The number of values that follow the flag, in argparse's notation; 0: no value."""
    default: str
    """The default in words; empty where there is none."""
    help: str
    choices: list[str] | None = None
    """The only values that the flag takes; None: it takes others too."""
    is_switch: bool = False
    """Whether the flag is on or off, so that it is typed alone."""


def show_help(
    line: CommandLine, words: Sequence[str], build: Callable[[bool], argparse.ArgumentParser] | None = None
) -> None:
    """Print the help of a command: the recorded one, or where it cannot be printed or --help_all is typed, the
    parser's.

    Args:
        words: the words behind the command's name.
        build: makes the parser, whose help shows the Trainer's rarer flags too where the argument is True; None for a
            command without flags of the Trainer, which has one help.
    """
    if build is None:
        print_help(line)
        return
    show_all = "--help_all" in words
    if show_all or not print_help(line):
        build(show_all).print_help()


def print_help(line: CommandLine) -> bool:
    """Print the help of a command, unless it shows the Trainer's flags and the record is of another Transformers
    version.

    Returns:
        Whether the help was printed.
    """
    entries = [entry for kind in line.kinds for entry in entries_of(kind)]
    if line.trainer is not None:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        if record["transformers"] != version("transformers"):
            return False
        recorded = [HelpEntry(**flag, help=TRAINER_TEXTS.get(flag["name"], "")) for flag in record["flags"]]
        entries += _trainer_entries(line.trainer, recorded)
    parser = argparse.ArgumentParser(**line.layout)
    for entry in entries:
        if line.refusal(entry.name):
            continue
        options: dict[str, Any] = {"action": "store_false"}
        if entry.nargs != 0:
            options = {"nargs": entry.nargs, "choices": entry.choices, "metavar": "VALUE"}
        action = parser.add_argument(*entry.options, dest=entry.name, default=entry.default, help=entry.help, **options)
        action.const = True if entry.is_switch else action.const
    sort_into_sections(parser, line.kinds, has_trainer=line.trainer is not None)
    parser.print_help()
    return True


def _trainer_entries(own: type, recorded: list[HelpEntry]) -> list[HelpEntry]:
    """The Trainer's flags that a help shows, in the Trainer's order; entries of `own` replace recorded ones."""
    theirs, ours = _by_name(recorded), _by_name(entries_of(own))
    return [entry for name, entries in (theirs | ours).items() if name in SHOWN_FLAGS for entry in entries]


def _by_name(entries: Iterable[HelpEntry]) -> dict[str, list[HelpEntry]]:
    found: dict[str, list[HelpEntry]] = {}
    for entry in entries:
        found.setdefault(entry.name, []).append(entry)
    return found


def entries_of(kind: type) -> Iterator[HelpEntry]:
    """The help entries of a class of flags, equal to those that `HfArgumentParser` makes from its fields."""
    flags = flags_class(kind)
    types = get_type_hints(flags)
    for item in fields(flags):
        if item.init:
            yield from _entries(item, types[item.name])


def _entries(item: Field[Any], kind: Any) -> Iterator[HelpEntry]:
    aliases = item.metadata.get("aliases", [])
    options = [f"--{item.name}", *([aliases] if isinstance(aliases, str) else aliases)]
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    has_default = default is not MISSING
    is_switch = kind is bool or kind == bool | None  # a switch may be typed alone or with a value
    nargs = item.metadata.get("nargs", "?" if is_switch else "+" if get_origin(kind) is list else None)
    shown = default_in_words(default if has_default else None)
    text, choices = item.metadata.get("help", ""), item.metadata.get("choices")
    literal = next((part for part in (kind, *get_args(kind)) if get_origin(part) is Literal), None)
    choices = list(get_args(literal)) if literal is not None and choices is None else choices
    yield HelpEntry(item.name, options, nargs, shown, text, choices, is_switch)
    if is_switch and default is True:
        yield HelpEntry(item.name, [f"--no_{item.name}"], 0, "", text)
