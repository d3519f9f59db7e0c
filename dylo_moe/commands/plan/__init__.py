"""`dylora plan`, with the flags of `dylora train`: parameters, memory and steps of a run, before it starts."""

from __future__ import annotations

import argparse

from dylo_moe.parsing.ending import asks_for_help
from dylo_moe.parsing.help import show_help
from dylo_moe.utils.garbage import no_garbage_collection


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if asks_for_help(words):
        from dylo_moe.commands.plan.arguments import PLAN_LINE

        show_help(PLAN_LINE, words, _build_parser)
        return 0
    with no_garbage_collection():
        from transformers.utils import logging as transformers_logging

        from dylo_moe.commands.plan.request import parse_plan
        from dylo_moe.commands.plan.run import make_plan
        from dylo_moe.commands.plan.screen import show_plan

        request = parse_plan(words)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        plan = make_plan(request)
    show_plan(request, plan)
    return 0


def _build_parser(show_all: bool) -> argparse.ArgumentParser:
    from dylo_moe.commands.plan.request import build_plan_parser  # late: it takes seconds to import

    return build_plan_parser(show_all=show_all)
