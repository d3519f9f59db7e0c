"""`dylora eval`: held-out losses with intervals, and pass@k, of a checkpoint."""

from __future__ import annotations

from dylo_moe.parsing.ending import asks_for_help
from dylo_moe.parsing.help import show_help
from dylo_moe.utils.garbage import no_garbage_collection


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if not words or asks_for_help(words):
        from dylo_moe.commands.eval.arguments import EVAL_LINE

        show_help(EVAL_LINE, words)
        return 0
    with no_garbage_collection():
        from dylo_moe.commands.eval.request import parse_eval

    request = parse_eval(words)
    with no_garbage_collection():
        from dylo_moe.commands.eval.run import evaluate_checkpoint

    evaluate_checkpoint(request)
    return 0
