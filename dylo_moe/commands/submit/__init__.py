"""`dylora submit`, and `python submit_full_training.py`: send a training run to Vertex AI as a job."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dylo_moe.parsing.ending import asks_for_help
from dylo_moe.parsing.help import show_help
from dylo_moe.utils.garbage import no_garbage_collection


def main(words: list[str], constants: Mapping[str, Any] | None = None) -> int:
    """Run the command on the words behind its name; returns the exit status.

    Args:
        constants: the `globals()` of a script whose constants are flags too, as those of submit_full_training.py are.
    """
    if (not words and constants is None) or asks_for_help(words):
        from dylo_moe.commands.submit.arguments import SUBMIT_LINE

        show_help(SUBMIT_LINE, words, _build_parser)
        return 0
    with no_garbage_collection():
        from dylo_moe.commands.submit.request import parse_submit
        from dylo_moe.commands.submit.run import submit

    if constants is not None:
        from dylo_moe.commands.submit.constants import with_constants

        words = with_constants(constants, words)
    submit(parse_submit(words))
    return 0


def _build_parser(show_all: bool) -> argparse.ArgumentParser:
    from dylo_moe.commands.submit.request import build_submit_parser  # late: it takes seconds to import

    return build_submit_parser(show_all=show_all)
