"""`dylora compare`: compare a routed model with the base, single LoRAs of equal size, and routing that is not
learned."""

from __future__ import annotations

import argparse

from dylo_moe.parsing.ending import asks_for_help, until_stopped
from dylo_moe.parsing.help import show_help
from dylo_moe.utils.garbage import no_garbage_collection


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if asks_for_help(words):
        from dylo_moe.commands.compare.arguments import COMPARE_LINE

        show_help(COMPARE_LINE, words, _build_parser)
        return 0
    with no_garbage_collection():
        from dylo_moe.commands.compare.request import parse_compare
        from dylo_moe.commands.compare.run import compare

    return until_stopped("compare", lambda: compare(parse_compare(words)))


def _build_parser(show_all: bool) -> argparse.ArgumentParser:
    from dylo_moe.commands.compare.request import build_compare_parser  # late: it takes seconds to import

    return build_compare_parser(show_all=show_all)
