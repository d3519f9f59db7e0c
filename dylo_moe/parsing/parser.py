"""The parser that all commands share: it knows one spelling of each flag, and has an answer to every wrong one."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from dylo_moe.parsing.command_line import SHOWN_FLAGS, CommandLine, Refusal
from dylo_moe.parsing.flags import config_from, flags_class, flags_of
from dylo_moe.utils.errors import UsageError


class Parser(HfArgumentParser):
    """A parser for the flags of several config classes, which raises at a mistake instead of ending the program.

    Args:
        kinds: the config classes; the Trainer's arguments, where they are among them, must come last.
    """

    def __init__(self, kinds: Sequence[type], **options: Any) -> None:
        super().__init__([flags_class(kind) for kind in kinds], **options)  # type: ignore[misc]
        self.kinds = tuple(kinds)

    def configs(self, words: Sequence[str]) -> tuple[Any, ...]:
        """Make an instance of each class from a command line.

        Raises:
            ValueError: with the problems of all classes. The last class is made only where the others have no problem,
                because making the Trainer's arguments sets up the device.
        """
        values = vars(self.parse_args(words))
        made: list[Any] = []
        problems: list[str] = []
        for kind in self.kinds:
            if problems and kind is self.kinds[-1]:
                break
            try:
                made.append(config_from(kind, values))
            except ValueError as error:
                problems.append(str(error).strip())
        if problems:
            raise ValueError("; ".join(problems))
        return tuple(made)

    def error(self, message: str) -> Any:
        """Raise UsageError with the message that argparse would print before it ends the program."""
        raise UsageError(message)


def plain_options(parser: Parser) -> Parser:
    """Reduce every flag of a parser to one spelling, with underscores, and let a switch be typed without a value."""
    for action in parser._actions:
        action.metavar = "VALUE"
        if action.type is string_to_bool and action.nargs is None:  # how the parser takes `bool | None`
            action.nargs, action.const = "?", True
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
    return parser


def parse(parser: Parser, words: list[str], refusal: Refusal, given: Sequence[str] = ()) -> tuple[Any, ...]:
    """Read a command line into the configs of a parser; words in `given` come first and are not checked as typed
    flags."""
    _check_names(words, parser, refusal)
    try:
        return parser.configs([*given, *words])
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error).strip()) from error


def parse_behind_checkpoint(argv: Sequence[str], parser: Parser) -> tuple[str, Any, set[str]]:
    """Read `CHECKPOINT [--FLAG VALUE ...]`: returns the checkpoint, the dataclass of the flags, and the flags typed.

    Raises:
        UsageError: where no checkpoint comes first, and as `parse` does.
    """
    words = list(argv)
    if not words or words[0].startswith("--"):
        raise UsageError(
            f"no checkpoint is named; type its folder right after the command: {parser.prog} RUN/checkpoint"
        )
    (values,) = parse(parser, words[1:], lambda name: None)
    return words[0], values, {word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")}


def options(parser: Parser) -> set[str]:
    """Every flag that a parser knows, with its dashes."""
    return set(parser._option_string_actions)


def _check_names(words: list[str], parser: Parser, refusal: Refusal) -> None:
    problems = []
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and (name not in options(parser) or refusal(name[2:])):
            problems.append(unknown(name, parser, refusal))
    if problems:
        raise UsageError("; ".join(problems))


def unknown(name: str, parser: Parser, refusal: Refusal) -> str:
    """The message about an unknown or refused flag: the reason, or the nearest flag that is offered."""
    reason = refusal(name.lstrip("-"))
    if reason:
        return f"{name} is not offered: {reason}"
    offered = [option for option in options(parser) if "-" not in option[2:] and not refusal(option[2:])]
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.5)
    return f"there is no flag {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags")


def build_parser(line: CommandLine, trainer: type | None = None, *, show_all: bool = False) -> Parser:
    """Build the parser of a command.

    Args:
        trainer: the Trainer's arguments, where the command has them.
        show_all: --help shows the Trainer's rarer flags too.
    """
    parser = Parser(line.kinds if trainer is None else (*line.kinds, trainer), **line.layout)
    shown = {*SHOWN_FLAGS, *(flag for kind in line.kinds for flag in flags_of(kind))}
    for action in parser._actions:
        if line.refusal(action.dest) or (action.dest not in shown and not show_all):
            action.help = argparse.SUPPRESS
    return plain_options(parser)
