"""`dylora stream`: learn datasets one after another."""

from __future__ import annotations

import argparse

from dylo_moe.parsing.ending import asks_for_help, until_stopped
from dylo_moe.parsing.help import show_help
from dylo_moe.utils.garbage import no_garbage_collection


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if asks_for_help(words):
        from dylo_moe.commands.stream.arguments import STREAM_LINE

        show_help(STREAM_LINE, words, _build_parser)
        return 0
    with no_garbage_collection():
        from dylo_moe.commands.stream.request import parse_stream
        from dylo_moe.commands.stream.run import stream

    return until_stopped("stream", lambda: stream(parse_stream(words)))


def _build_parser(show_all: bool) -> argparse.ArgumentParser:
    from dylo_moe.commands.stream.request import build_stream_parser  # late: it takes seconds to import

    return build_stream_parser(show_all=show_all)
