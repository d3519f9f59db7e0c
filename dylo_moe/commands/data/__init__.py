"""`dylora data`: list datasets, show one as the model sees it, or check them."""

from __future__ import annotations

from dylo_moe.parsing.ending import asks_for_help, no_such_command
from dylo_moe.parsing.help import show_help
from dylo_moe.parsing.help_format import overview
from dylo_moe.parsing.plain import PlainParser
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.garbage import no_garbage_collection

DESCRIPTION = "Look at data before it is trained on."

COMMANDS = {
    "list": "every dataset that has a name: size, format, licence, source",
    "show": "print examples, prompt and trained tokens in different colours",
    "check": "count rows, lengths, duplicates, padding, and overlap with HumanEval and MBPP's test split",
}


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(overview("dylora data COMMAND [NAME ...] [--FLAG VALUE ...]", COMMANDS, description=DESCRIPTION))
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        raise UsageError(no_such_command(command, COMMANDS, of="data"))
    if command == "list":
        text = "Print every dataset that has a name: size, format, licence, source."
        parser = PlainParser("dylora data list", "", text, ["dylora data list"])
        if parser.shows_help(rest):
            return 0
        parser.read(rest)
        from dylo_moe.commands.data.run import list_datasets

        list_datasets()
        return 0
    prog = f"dylora data {command}"
    if asks_for_help(rest):
        from dylo_moe.commands.data.arguments import look_line

        show_help(look_line(prog), rest)
        return 0
    with no_garbage_collection():
        from dylo_moe.commands.data.request import parse_look

    request = parse_look(rest, prog=prog)
    with no_garbage_collection():
        from dylo_moe.commands.data.run import check_datasets, show_dataset

    {"show": show_dataset, "check": check_datasets}[command](request.data, request.look)
    return 0
