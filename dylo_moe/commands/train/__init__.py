"""`dylora train`, and `python train.py`: several experts and their router trained together."""

from __future__ import annotations

from dylo_moe.commands.ending import asks_for_help, until_stopped


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    from dylo_moe.commands.train.arguments import build_parser, parse_train

    if asks_for_help(words):
        build_parser("dylora train", show_all="--help_all" in words).print_help()
        return 0
    from dylo_moe.commands.train.run import train

    return until_stopped("train", lambda: train(parse_train(words)))
