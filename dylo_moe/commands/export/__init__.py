"""`dylora export`: a checkpoint for engines that do not route each token, and what that loses."""

from __future__ import annotations

from dylo_moe.commands.ending import asks_for_help


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    from dylo_moe.commands.export.arguments import build_export_parser, parse_export

    if not words or asks_for_help(words):
        build_export_parser().print_help()
        return 0
    request = parse_export(words)
    from dylo_moe.commands.export.run import export

    export(request)
    return 0
