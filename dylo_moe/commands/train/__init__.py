"""`dylora train`, and `python train.py`: train several experts and their router together."""

from __future__ import annotations

from dylo_moe.parsing.ending import asks_for_help, until_stopped
from dylo_moe.parsing.help import print_help


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if asks_for_help(words):
        from dylo_moe.commands.train.arguments import TRAIN_LINE

        if "--help_all" in words or not print_help(TRAIN_LINE):
            from dylo_moe.commands.train.request import build_train_parser

            build_train_parser(show_all="--help_all" in words).print_help()
        return 0
    from dylo_moe.commands.train.request import parse_train
    from dylo_moe.commands.train.run import train

    return until_stopped("train", lambda: train(parse_train(words)))
