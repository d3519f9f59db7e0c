"""`dylora stream`: datasets learned one after another."""

from __future__ import annotations

from dylo_moe.commands.ending import asks_for_help, until_stopped


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    from dylo_moe.commands.stream.arguments import build_stream_parser, parse_stream

    if asks_for_help(words):
        build_stream_parser(show_all="--help_all" in words).print_help()
        return 0
    from dylo_moe.commands.stream.run import stream

    return until_stopped("stream", lambda: stream(parse_stream(words)))
