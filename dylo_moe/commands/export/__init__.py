"""`dylora export`: write a checkpoint for engines that do not route each token, and measure what that loses."""

from __future__ import annotations

from dylo_moe.parsing.ending import asks_for_help
from dylo_moe.parsing.help import show_help
from dylo_moe.utils.garbage import no_garbage_collection


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if not words or asks_for_help(words):
        from dylo_moe.commands.export.arguments import EXPORT_LINE

        show_help(EXPORT_LINE, words)
        return 0
    with no_garbage_collection():
        from dylo_moe.commands.export.request import parse_export

    request = parse_export(words)
    with no_garbage_collection():
        from dylo_moe.commands.export.run import export

    export(request)
    return 0
