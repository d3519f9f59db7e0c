"""`dylora plan`, with the flags of `dylora train`: parameters, memory and steps of a run, before it starts."""

from __future__ import annotations

from dylo_moe.parsing.ending import asks_for_help
from dylo_moe.parsing.help import print_help


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if asks_for_help(words):
        from dylo_moe.commands.plan.arguments import PLAN_LINE

        if "--help_all" in words or not print_help(PLAN_LINE):
            from dylo_moe.commands.plan.request import build_plan_parser

            build_plan_parser(show_all="--help_all" in words).print_help()
        return 0
    from dylo_moe.commands.plan.request import parse_plan
    from dylo_moe.commands.plan.run import show_plan

    show_plan(*parse_plan(words))
    return 0
