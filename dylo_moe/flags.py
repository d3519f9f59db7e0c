"""What the parsers of the commands share: one spelling of each flag, and an answer for every wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from transformers import HfArgumentParser

Refusal = Callable[[str], str | None]
"""Why a flag of that name is not offered; None where it is."""


class UsageError(ValueError):
    """A mistake on the command line or in a recipe."""


class Parser(HfArgumentParser):
    """Raises a mistake instead of leaving the program."""

    def error(self, message: str) -> Any:
        """Called with what is wrong."""
        raise UsageError(message)


def plain_options(parser: HfArgumentParser) -> HfArgumentParser:
    """Every flag under one spelling, with underscores."""
    for action in parser._actions:
        action.metavar = "VALUE"
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
    return parser


def parse(parser: HfArgumentParser, words: list[str], refusal: Refusal, given: Sequence[str] = ()) -> tuple[Any, ...]:
    """The dataclasses of a parser; `given` words are not the user's own."""
    _check_names(words, parser, refusal)
    try:
        return parser.parse_args_into_dataclasses([*given, *words], look_for_args_file=False)
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error).strip()) from error


def parse_behind_checkpoint(argv: Sequence[str], parser: HfArgumentParser) -> tuple[str, Any, set[str]]:
    """`CHECKPOINT [--FLAG VALUE ...]`: the checkpoint, the dataclass of the flags, and which flags were typed.

    Raises:
        UsageError: where no checkpoint comes first, and as `parse` does.
    """
    words = list(argv)
    if not words or words[0].startswith("--"):
        raise UsageError(
            f"no checkpoint is named; type its folder right behind the command: {parser.prog} RUN/checkpoint"
        )
    (values,) = parse(parser, words[1:], lambda name: None)
    return words[0], values, {word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")}


def options(parser: HfArgumentParser) -> set[str]:
    """Every flag that a parser knows, with its dashes."""
    return set(parser._option_string_actions)


def _check_names(words: list[str], parser: HfArgumentParser, refusal: Refusal) -> None:
    problems = []
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and (name not in options(parser) or refusal(name[2:])):
            problems.append(unknown(name, parser, refusal))
    if problems:
        raise UsageError("; ".join(problems))


def unknown(name: str, parser: HfArgumentParser, refusal: Refusal) -> str:
    """What to tell who typed an unknown or refused flag."""
    reason = refusal(name.lstrip("-"))
    if reason:
        return f"{name} is not offered: {reason}"
    offered = [option for option in options(parser) if "-" not in option[2:] and not refusal(option[2:])]
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.5)
    return f"there is no flag {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags")
