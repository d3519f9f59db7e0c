"""The parser of commands with few flags, which are declared where the command is."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dylo_moe.parsing.ending import asks_for_help
from dylo_moe.parsing.help_format import Formatter, epilog
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.words import nearest

KINDS = {int: "a whole number", float: "a number"}
"""What a value of each type is called in messages."""


class PlainParser(argparse.ArgumentParser):
    """A parser that raises at a mistake, with the usage, instead of ending the program.

    It leaves to argparse only which word belongs to which flag: argparse stops at the first missing or unreadable
    value, and here one message holds all of them.

    Args:
        prog: the command, such as `dylora report`.
        usage: what is typed behind it.
        examples: whole command lines, which the help ends with.
        meant: the names of flags of other commands, each with the flag of this one that does the same, without dashes.
    """

    def __init__(
        self, prog: str, usage: str, description: str, examples: Sequence[str], meant: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}".strip(),
            description=description,
            epilog=epilog(examples),
            allow_abbrev=False,
            add_help=False,
            formatter_class=Formatter,
        )
        self._positionals.title, self._optionals.title = "arguments", "flags"
        self._meant = meant or {}
        self._kinds: dict[str, type] = {}
        self._needed: dict[str, str] = {}

    def add_flag(self, name: str, *, kind: type = str, is_needed: bool = False, **options: Any) -> None:
        """Add a flag that takes a value.

        Args:
            kind: int, float or str, which the typed value is read as.
            is_needed: whether the flag must be given.
            options: those of `add_argument`.
        """
        action = self.add_argument(name, **options)
        self._kinds[action.dest] = kind
        if is_needed:
            self._needed[action.dest] = name

    def add_word(self, name: str, *, metavar: str, help: str) -> None:
        """Add an argument that is typed without a flag and must be given."""
        self.add_argument(name, metavar=metavar, nargs="?", help=help)
        self._needed[name] = metavar

    def shows_help(self, words: Sequence[str]) -> bool:
        """Print the help where a command line asks for it; returns whether it does."""
        if asks_for_help(words):
            self.print_help()
            return True
        return False

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The values of a command line, by the names of the flags and arguments.

        Raises:
            UsageError: for unknown flags, each with the nearest one, for what is missing, and for values that cannot be
                read; one message holds all of them.
        """
        unknown = [word.split("=", 1)[0] for word in words if word.startswith("--")]
        problems = [self._unknown(name) for name in unknown if name not in self._option_string_actions]
        space, strays = self.parse_known_args(words)
        values = vars(space)
        missing = [shown for name, shown in self._needed.items() if values[name] is None]
        if strays and not problems:  # behind an unknown flag they may be its values
            verb = "belongs" if len(strays) == 1 else "belong"
            meant = " ".join(f"{flag} {shlex.quote(word)}" for flag, word in zip(missing, strays, strict=False))
            missing = missing[len(strays) :]
            problems.append(f"{', '.join(map(repr, strays))} {verb} to no flag" + (f": type {meant}" if meant else ""))
        if missing:
            problems.append(f"{' and '.join(missing)} must be given")
        for name, kind in self._kinds.items():
            if isinstance(values[name], str):
                try:
                    values[name] = kind(values[name])
                except ValueError:
                    problems.append(f"{name} is {values[name]!r}; it must be {KINDS[kind]}")
        if problems:
            self.error("; ".join(problems))
        return values

    def _unknown(self, name: str) -> str:
        meant = self._meant.get(name[2:])
        near = nearest(name[2:], [option[2:] for option in self._option_string_actions])
        said = f"; here it is called --{meant}" if meant else f"; did you mean --{near}?" if near else ""
        return f"there is no flag {name}{said}"

    def error(self, message: str) -> Any:
        """Raise UsageError with a message, which may be one of argparse about a flag's value, and the usage."""
        message = re.sub(r"^argument (\S+): expected one argument$", r"\1 has no value", message)
        message = re.sub(r"^argument (\S+): ignored explicit argument .*$", r"\1 takes no value", message)
        raise UsageError(f"{message} (usage: {self.usage})")
