"""`dylora train`, and `python train.py`: train several experts and their router together."""

from __future__ import annotations

import argparse

from dylo_moe.parsing.ending import asks_for_help, until_stopped
from dylo_moe.parsing.help import show_help
from dylo_moe.utils.garbage import no_garbage_collection


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if asks_for_help(words):
        from dylo_moe.commands.train.arguments import TRAIN_LINE

        show_help(TRAIN_LINE, words, _build_parser)
        return 0
    with no_garbage_collection():
        from dylo_moe.commands.train.request import parse_train
        from dylo_moe.commands.train.run import train

    return until_stopped("train", lambda: train(parse_train(words)))


def _build_parser(show_all: bool) -> argparse.ArgumentParser:
    from dylo_moe.commands.train.request import build_train_parser  # late: it takes seconds to import

    return build_train_parser(show_all=show_all)
