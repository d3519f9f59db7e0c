"""`dylora compare`: a routed model beside the base, single LoRAs of equal size, and routing that is not learned."""

from __future__ import annotations

from dylo_moe.commands.ending import asks_for_help, until_stopped


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    from dylo_moe.commands.compare.arguments import build_compare_parser, parse_compare

    if asks_for_help(words):
        build_compare_parser(show_all="--help_all" in words).print_help()
        return 0
    from dylo_moe.commands.compare.run import compare

    return until_stopped("compare", lambda: compare(parse_compare(words)))
