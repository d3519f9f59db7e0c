"""`dylora submit`, and `python submit_full_training.py`: send a training run to Vertex AI as a job."""

from __future__ import annotations

from dylo_moe.parsing.ending import asks_for_help
from dylo_moe.parsing.help import print_help


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    if not words or asks_for_help(words):
        from dylo_moe.commands.submit.arguments import SUBMIT_LINE

        if "--help_all" in words or not print_help(SUBMIT_LINE):
            from dylo_moe.commands.submit.request import build_submit_parser

            build_submit_parser(show_all="--help_all" in words).print_help()
        return 0
    from dylo_moe.commands.submit.request import parse_submit
    from dylo_moe.commands.submit.run import submit

    submit(parse_submit(words))
    return 0
