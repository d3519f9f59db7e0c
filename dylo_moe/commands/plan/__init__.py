"""`dylora plan`, with the flags of `dylora train`: parameters, memory and steps of a run, before it starts."""

from __future__ import annotations

import gc

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
    gc.disable()  # a quarter of the time that imports take is spent looking for garbage, of which they leave none
    try:
        from transformers.utils import logging as transformers_logging

        from dylo_moe.commands.plan.request import parse_plan
        from dylo_moe.commands.plan.run import make_plan
        from dylo_moe.commands.plan.screen import show_plan
    finally:
        gc.enable()

    request = parse_plan(words)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    show_plan(request, make_plan(request))
    return 0
