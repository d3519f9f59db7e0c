"""`dylora eval`: held-out losses with intervals, and pass@k, of a checkpoint."""

from __future__ import annotations

from dylo_moe.commands.ending import asks_for_help


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    from dylo_moe.commands.eval.arguments import build_eval_parser, parse_eval

    if not words or asks_for_help(words):
        build_eval_parser().print_help()
        return 0
    request = parse_eval(words)
    from dylo_moe.commands.eval.run import evaluate_checkpoint

    evaluate_checkpoint(request)
    return 0
