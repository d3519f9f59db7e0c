"""`dylora experts`: list a checkpoint's experts, remove one, merge two, or fit the gate again."""

from __future__ import annotations

from collections.abc import Callable

from dylo_moe.parsing.ending import no_such_command
from dylo_moe.parsing.help_format import overview
from dylo_moe.parsing.plain import PlainParser
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.garbage import no_garbage_collection

DESCRIPTION = "Look at the experts of a checkpoint, and change which there are."

COMMANDS = {
    "list": "the experts of a checkpoint in gate order, and the skills that each one knows",
    "remove": "write the checkpoint without one expert, its gate row and its skills; the others stay bit-equal",
    "merge": "write the checkpoint with one expert in place of two, which knows the skills of both; the others stay "
    "bit-equal",
    "refit": "fit all gate rows again to the skill library: show what changes, and with --output write the result",
}


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(overview("dylora experts COMMAND CHECKPOINT ...", COMMANDS, description=DESCRIPTION))
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        raise UsageError(no_such_command(command, COMMANDS, of="experts"))
    parser = make_parser(command)
    if parser.shows_help(rest):
        return 0
    values = parser.read(rest)
    with no_garbage_collection():
        from dylo_moe.commands.experts.merge import merge
        from dylo_moe.commands.experts.run import list_experts, refit, remove_expert

    calls: dict[str, Callable[..., None]] = {
        "list": list_experts,
        "remove": remove_expert,
        "merge": merge,
        "refit": refit,
    }
    calls[command](**values)
    return 0


def make_parser(command: str) -> PlainParser:
    """The parser of `dylora experts list`, `remove`, `merge` or `refit`."""
    prog = f"dylora experts {command}"
    more = {
        "list": "",
        "remove": " EXPERT --output FOLDER",
        "merge": " EXPERT OTHER --output FOLDER [--FLAG ...]",
        "refit": " [--output FOLDER] [--seed VALUE]",
    }[command]
    example = {
        "remove": " expert_0 --output less",
        "merge": " python python_2 --output merged",
        "refit": " --output refitted",
    }.get(command, "")
    text = f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}."
    parser = PlainParser(prog, f"CHECKPOINT{more}", text, [f"{prog} runs/skills/checkpoint{example}"])
    parser.add_word("checkpoint", metavar="CHECKPOINT", help="A run's folder, or the folder that holds dylora.json.")
    if command == "remove":
        parser.add_word("name", metavar="EXPERT", help="The expert to remove.")
        parser.add_flag("--output", is_needed=True, help="A new folder for the checkpoint without it.")
    if command == "merge":
        parser.add_word("first", metavar="EXPERT", help="One of the two experts.")
        parser.add_word("second", metavar="OTHER", help="The other one.")
        parser.add_flag("--output", is_needed=True, help="A new folder for the checkpoint with the merged expert.")
        parser.add_flag("--name", help="The name of the merged expert; without it that of EXPERT.")
        parser.add_flag("--rank", kind=int, help="Its rank; without it the larger of the two.")
    if command == "refit":
        parser.add_flag("--output", help="A new folder for the refitted checkpoint; without it nothing is written.")
        parser.add_flag("--seed", kind=int, default=0, help="Seed of the draws from the skills' statistics.")
    return parser
