"""`dylora experts`: list a checkpoint's experts, remove one, or fit the gate again."""

from __future__ import annotations

import argparse
from collections.abc import Callable

COMMANDS = {
    "list": "the experts of a checkpoint in gate order, and the skills that each one knows",
    "remove": "write the checkpoint without one expert, its gate row and its skills; the others stay bit-equal",
    "refit": "fit all gate rows again to the skill library: show what changes, and with --output write the result",
}


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        lines = ["usage: dylora experts COMMAND CHECKPOINT ...", ""]
        lines += [f"  {name:7s} {text}" for name, text in COMMANDS.items()]
        print("\n".join([*lines, "", "`dylora experts COMMAND --help` explains a command."]))
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        raise ValueError(f"there is no command experts {command!r}; there are {', '.join(COMMANDS)}")
    prog = f"dylora experts {command}"
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=COMMANDS[command])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint folder (the one that holds dylora.json)")
    if command == "remove":
        parser.add_argument("name", metavar="EXPERT", help="the expert to remove")
        parser.add_argument("--output", required=True, help="a new folder for the checkpoint without it")
    if command == "refit":
        parser.add_argument("--output", help="a new folder for the refitted checkpoint; without it nothing is written")
        parser.add_argument("--seed", type=int, default=0, help="seed of the draws from the skills' statistics")
    arguments = parser.parse_args(rest)
    from dylo_moe.commands.experts.run import list_experts, refit, remove_expert

    calls: dict[str, Callable[..., None]] = {"list": list_experts, "remove": remove_expert, "refit": refit}
    calls[command](**vars(arguments))
    return 0
