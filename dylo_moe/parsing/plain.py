"""The parser of commands with few flags, which are declared where the command is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dylo_moe.parsing.ending import asks_for_help
from dylo_moe.parsing.help_format import Formatter, epilog
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.words import nearest


class PlainParser(argparse.ArgumentParser):
    """A parser that raises at a mistake, with the usage, instead of ending the program.

    Args:
        prog: the command, such as `dylora report`.
        usage: what is typed behind it.
        examples: whole command lines, which the help ends with.
    """

    def __init__(self, prog: str, usage: str, description: str, examples: Sequence[str]) -> None:
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

    def shows_help(self, words: Sequence[str]) -> bool:
        """Print the help where a command line asks for it; returns whether it does."""
        if asks_for_help(words):
            self.print_help()
            return True
        return False

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The values of a command line, by the names of the flags and arguments.

        Raises:
            UsageError: for an unknown flag, with the nearest one, and where something is missing or no value.
        """
        for word in words:
            name = word.split("=", 1)[0]
            if name.startswith("--") and name not in self._option_string_actions:
                near = nearest(name[2:], [option[2:] for option in self._option_string_actions])
                self.error(f"there is no flag {name}" + (f"; did you mean --{near}?" if near else ""))
        return vars(self.parse_args(words))

    def error(self, message: str) -> Any:
        """Raise UsageError with the message of argparse, and the usage."""
        required = "the following arguments are required: "
        said = f"{message.removeprefix(required)} must be given" if message.startswith(required) else message
        raise UsageError(f"{said} (usage: {self.usage})")
