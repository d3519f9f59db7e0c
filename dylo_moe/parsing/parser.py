"""The parser that all commands share: it knows one spelling of each flag, and has an answer to every wrong one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, cast

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from dylo_moe.model.checkpoint import checkpoint_in
from dylo_moe.parsing.command_line import SHOWN_FLAGS, CommandLine, Refusal, refuses_nothing
from dylo_moe.parsing.flags import config_from, flags_class, flags_of
from dylo_moe.parsing.help_format import sort_into_sections
from dylo_moe.parsing.other_names import OTHER_VALUES, meant_by
from dylo_moe.parsing.plain import KINDS
from dylo_moe.parsing.trainer_texts import TRAINER_TEXTS
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.words import listed, nearest


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
            ValueError: with the problems of all classes. A class that has `problems_of` is asked by that once another
                class has a problem, and not made, because making the Trainer's arguments sets up the device.
        """
        good, problems = self._readable(words)
        given = {flag for flag, _ in grouped(good)}
        needed = [action for action in self._actions if action.required and not given & {*action.option_strings}]
        if needed:
            typed = {flag for flag, _ in grouped(self.with_values(words))}
            missing = [action.option_strings[0] for action in needed if not typed & {*action.option_strings}]
            raise ValueError("; ".join([*problems, *(f"{name} must be given" for name in missing)]))
        values = vars(self.parse_args(good))
        made: list[Any] = []
        for kind in self.kinds:
            if problems and hasattr(kind, "problems_of"):
                problems += kind.problems_of(values)
                continue
            try:
                made.append(config_from(kind, values))
            except ValueError as error:
                problems.append(str(error).strip().removeprefix(f"{kind.__name__}: "))
        if problems:
            raise ValueError("; ".join(problems))
        return tuple(made)

    def _readable(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Separate the flags whose values can be read from the problems of the others, for argparse stops at the
        first."""
        good: list[str] = []
        problems: list[str] = []
        for flag, values in grouped(self.with_values(words)):
            action = self._option_string_actions.get(flag)
            found = [] if action is None else [value_problem(action, value) for value in values]
            if action is not None and action.nargs in (None, "+") and not values:
                problems.append(f"{flag} has no value")
            elif any(found):
                problems += [problem for problem in found if problem]
            else:
                good += _ungrouped([(flag, values)])
        return good, problems

    def with_values(self, words: Sequence[str]) -> list[str]:
        """Write every flag of a command line that takes one value as `--flag=value`, so that what follows it is
        neither lost nor swallowed. A flag that may be typed bare gets the value that it has then: a switch is True.
        """
        left, written = list(words), []
        while left:
            word = left.pop(0)
            action = self._option_string_actions.get(word)
            if action is None or action.nargs not in (None, "?"):
                written.append(word)
            elif left and _is_value(left[0], action):
                written.append(f"{word}={left.pop(0)}")
            else:
                written.append(word if action.nargs is None else f"{word}={action.const}")
        return written

    def is_switch(self, option: str) -> bool:
        """Whether a flag is either on or off."""
        return self._option_string_actions[option].type is string_to_bool

    def action(self, option: str) -> argparse.Action:
        """What argparse knows of a flag."""
        return self._option_string_actions[option]

    def split(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Split a command line into the words that belong to no flag and the others, wherever they stand."""
        alone: list[str] = []
        others: list[str] = []
        in_list = False
        for word in self.with_values(words):
            if word.startswith("--"):
                action = self._option_string_actions.get(word)
                in_list = "=" not in word and (action is None or action.nargs in ("+", "*"))
            (others if in_list or word.startswith("--") else alone).append(word)
        return alone, others

    def error(self, message: str) -> Any:
        """Raise UsageError with the message that argparse would print before it ends the program."""
        raise UsageError(message)


def grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The flags of a command line in their order, each with its values."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, sign, value = word.partition("=")
            groups.append((flag, [value] if sign else []))
        elif groups:
            groups[-1][1].append(word)
    return groups


def _ungrouped(groups: Sequence[tuple[str, list[str]]]) -> list[str]:
    """The words of flags with their values, as `grouped` takes them."""
    words = []
    for flag, values in groups:
        words += [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]
    return words


def value_problem(action: argparse.Action, text: str) -> str | None:
    """What is wrong with a value of a flag as it was typed; None: nothing that can be seen without the others."""
    name = action.dest
    try:
        value = action.type(text) if callable(action.type) else text
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        kind = (
            "true or false" if action.type is string_to_bool else KINDS.get(cast(Any, action.type), "of another form")
        )
        return f"{name} is {text!r}; it must be {kind}"
    if action.choices is None or value in action.choices:
        return None
    choices = [str(getattr(choice, "value", choice)) for choice in action.choices]
    near = OTHER_VALUES.get(name, {}).get(text.lower()) or nearest(text, choices)
    if near and len(choices) > 4:
        return f"{name} is {text!r}; did you mean {near}?"
    *others, last = choices
    return f"{name} is {text!r}; it must be {', '.join(others)} or {last}"


def _is_value(word: str, action: argparse.Action) -> bool:
    """Whether a word that follows a flag is the flag's value: a switch takes only true and false in their spellings."""
    if word.startswith("--"):
        return False
    if action.type is not string_to_bool:
        return True
    try:
        string_to_bool(word)
    except argparse.ArgumentTypeError:
        return False
    return True


def plain_options(parser: Parser) -> Parser:
    """Reduce every flag of a parser to one spelling, with underscores, and let a switch be typed without a value."""
    for action in parser._actions:
        action.metavar = "VALUE"
        if action.type is string_to_bool and action.nargs is None:  # how the parser takes `bool | None`
            action.nargs, action.const = "?", True
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
    known = parser._option_string_actions
    for option in [option for option in known if "-" in option[2:]]:
        del known[option]
    return parser


def parse(parser: Parser, words: Sequence[str], refusal: Refusal, given: Sequence[str] = ()) -> tuple[Any, ...]:
    """Read a command line into the configs of a parser; words in `given` come first and are not checked as typed
    flags.

    Raises:
        UsageError: with all problems: unknown flags, words that belong to none, and values.
    """
    words = parser.with_values(words)
    problems = [*_name_problems(words, parser, refusal), *stray_problems(words, parser)]
    known = [(flag, values) for flag, values in grouped(words) if not problems or flag in options(parser)]
    try:
        configs = parser.configs([*given, *(words if not problems else _ungrouped(known))])
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError("; ".join([*problems, str(error).strip()])) from error
    if problems:
        raise UsageError("; ".join(problems))
    return configs


def stray_problems(words: Sequence[str], parser: Parser) -> list[str]:
    """What to say of words that are no flag and the value of none."""
    alone, _ = parser.split(words)
    if not alone:
        return []
    before = words[list(words).index(alone[0]) - 1] if words[0] != alone[0] else ""
    option = before.partition("=")[0]
    is_behind_switch = option in options(parser) and parser.is_switch(option)
    rule = f"{option} takes true or false, or no value" if is_behind_switch else "--help lists the flags"
    return [f"{_strays(alone)} to no flag; {rule}"]


def check_every_word_has_a_flag(words: Sequence[str], parser: Parser) -> None:
    """Raise UsageError for words that are no flag and the value of none."""
    problems = stray_problems(words, parser)
    if problems:
        raise UsageError("; ".join(problems))


def _strays(words: Sequence[str]) -> str:
    return f"{listed([repr(word) for word in words])} {'belongs' if len(words) == 1 else 'belong'}"


def parse_with_checkpoint(argv: Sequence[str], parser: Parser) -> tuple[str, Any, set[str]]:
    """Read `CHECKPOINT [--FLAG VALUE ...]`; flags may come first, and a run's folder stands for its checkpoint.

    Returns:
        The checkpoint's folder, the dataclass of the flags, and the flags typed.

    Raises:
        UsageError: where no checkpoint or more than one is named, and as `parse` does.
    """
    alone, words = parser.split(argv)
    if not alone:
        raise UsageError(
            f"no checkpoint is named; type its folder right after the command: {parser.prog} RUN/checkpoint"
        )
    if len(alone) > 1:
        raise UsageError(f"one checkpoint at a time; {_strays(alone[1:])} to no flag")
    (values,) = parse(parser, words, refuses_nothing)
    return str(checkpoint_in(alone[0])), values, typed_flags(words)


def typed_flags(words: Sequence[str]) -> set[str]:
    """The names of the flags in a command line, without dashes."""
    return {word.split("=", 1)[0].removeprefix("--") for word in words if word.startswith("--")}


def options(parser: Parser) -> set[str]:
    """Every flag that a parser knows, with its dashes."""
    return set(parser._option_string_actions)


def _name_problems(words: Sequence[str], parser: Parser, refusal: Refusal) -> list[str]:
    names = [word.split("=", 1)[0] for word in words if word.startswith("--")]
    wrong = [name for name in names if name not in options(parser) or refusal(name[2:])]
    return [unknown(name, parser, refusal) for name in wrong]


def unknown(name: str, parser: Parser, refusal: Refusal) -> str:
    """The message about an unknown or refused flag: the reason, or the flag that is meant, or the nearest one."""
    plain = name.lstrip("-").replace("-", "_")
    reason = refusal(plain)
    if reason:
        return f"{name} is not offered: {reason}"
    offered = {option[2:] for option in options(parser) if "-" not in option[2:] and not refusal(option[2:])}
    meant = meant_by(plain, offered)
    near = nearest(plain, sorted(offered))
    answer = meant or (f"did you mean --{near}?" if near else "--help lists the flags")
    return f"there is no flag {name}; {answer}"


def build_parser(line: CommandLine, trainer: type | None = None, *, show_all: bool = False) -> Parser:
    """Build the parser of a command.

    Args:
        trainer: the Trainer's arguments, where the command has them.
        show_all: --help shows the Trainer's rarer flags too.
    """
    parser = Parser(line.kinds if trainer is None else (*line.kinds, trainer), **line.layout)
    shown = {*SHOWN_FLAGS, *(flag for kind in line.kinds for flag in flags_of(kind))}
    texts = {} if line.trainer is None else {**TRAINER_TEXTS, **dict.fromkeys(flags_of(line.trainer))}
    for action in parser._actions:
        if line.refusal(action.dest) or (action.dest not in shown and not show_all):
            action.help = argparse.SUPPRESS
        else:
            action.help = texts.get(action.dest) or action.help
    sort_into_sections(parser, line.kinds, has_trainer=trainer is not None)
    return plain_options(parser)
