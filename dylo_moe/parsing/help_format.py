"""How every help looks: sections of flags, one name for all values, defaults where there are some, and examples."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dylo_moe.parsing.flags import flags_of

MAX_WIDTH = 100
"""The longest line of a help, in letters; a narrower terminal has shorter lines."""

EXAMPLE_WIDTH = 76

SECTIONS = {
    "ModelArguments": "model",
    "ExpertConfig": "experts",
    "RouterConfig": "router",
    "GrowthConfig": "growth",
    "DataConfig": "data",
}
"""The titles of the sections whose flags several commands have. The other flags of a command are its own."""

OWN, TRAINING = "this command", "training"

EVERY_COMMAND = (
    "Every command also takes --quiet: it then prints only warnings, errors, and its answer or the path of its result."
)


def width() -> int:
    """The width of a help in letters."""
    return min(shutil.get_terminal_size().columns, MAX_WIDTH) - 2


class Formatter(argparse.HelpFormatter):
    """The formatter of all parsers."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap each paragraph; lines that begin with spaces, such as examples, stay as they are."""
        lines = [
            line if line.startswith(" ") or not line else textwrap.fill(line, width, break_on_hyphens=False)
            for line in text.splitlines()
        ]
        return textwrap.indent("\n".join(lines), indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "VALUE"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        metavar = action.metavar if isinstance(action.metavar, str) else default_metavar
        if action.nargs in ("+", "*"):
            return f"{metavar} ..."
        if action.nargs == "?":
            return "" if action.const is True else f"[{metavar}]"  # a switch is typed alone
        return "" if action.nargs == 0 else metavar

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return super()._format_action_invocation(action).rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        facts = [f"one of {', '.join(map(str, action.choices))}"] if action.choices else []
        default = default_in_words(action.default)
        if default and "default" not in text.lower() and action.nargs != 0:
            facts.append(f"default: {default}")
        return text + (f" ({'; '.join(facts)})".replace("%", "%%") if facts else "")


def default_in_words(default: Any) -> str:
    """How a help names a default; empty where there is none, and for a switch that is off."""
    if isinstance(default, (list, tuple)):
        return " ".join(map(str, default))
    return "" if default is None or default is False or default == argparse.SUPPRESS else str(default)


def epilog(examples: Sequence[str], *more: str) -> str:
    """The end of a help: what applies to every command, and examples, each one a command line."""
    return "\n\n".join([*more, EVERY_COMMAND, "\n".join(["examples:", *map(_example, examples)])])


def _example(command: str) -> str:
    """A command line, which goes on behind a backslash, as in a shell, where it is too long."""
    first, *flags = command.split(" --")
    lines = [f"  {first}"]
    for flag in flags:
        if len(f"{lines[-1]} --{flag}") > EXAMPLE_WIDTH:
            lines[-1] += " \\"
            lines.append(f"      --{flag}")
        else:
            lines[-1] += f" --{flag}"
    return "\n".join(lines)


def sort_into_sections(parser: argparse.ArgumentParser, kinds: Sequence[type], *, has_trainer: bool) -> None:
    """Show the flags of each class of flags under its own title.

    Args:
        kinds: the classes; a flag of none of them is the Trainer's.
        has_trainer: whether there are flags of the Trainer.
    """
    title_of = {flag: SECTIONS.get(kind.__name__, OWN) for kind in kinds for flag in flags_of(kind)}
    titles = dict.fromkeys(title_of.values())
    if len(titles) == 1 and not has_trainer:
        parser._optionals.title = "flags"
        return
    groups = {title: parser.add_argument_group(title) for title in (*titles, *([TRAINING] if has_trainer else []))}
    for action in parser._optionals._group_actions:
        groups[title_of.get(action.dest, TRAINING)]._group_actions.append(action)
    parser._optionals._group_actions = []


def overview(usage: str, commands: Mapping[str, str], *, description: str = "") -> str:
    """The help of a command that has sub-commands.

    Args:
        usage: how it is typed, such as `dylora data COMMAND`.
        commands: the summary of each sub-command.
    """
    column = max(map(len, commands)) + 4
    parts = []
    for name, summary in commands.items():
        filled = textwrap.wrap(summary, width() - column, break_on_hyphens=False)
        parts += [f"  {name:{column - 2}}{filled[0]}", *(" " * column + line for line in filled[1:])]
    command = re.match(r"dylora [a-z ]*COMMAND", usage)
    last = f"`{command[0] if command else usage} --help` explains a command, and shows examples. {EVERY_COMMAND}"
    said = [textwrap.fill(text, width()) for text in (description, last)]
    return "\n".join([f"usage: {usage}", "", *([said[0], ""] if description else []), *parts, "", said[1]])
