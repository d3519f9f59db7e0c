"""`dylora report`: one HTML page about a run or a stream."""

from __future__ import annotations

import argparse


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="dylora report",
        allow_abbrev=False,
        description="Write one page about a run or a stream: losses, routing, matrix, settings. It needs no network.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run or a stream, finished or not")
    parser.add_argument("--output", help="the page to write; default: report.html in that folder")
    arguments = parser.parse_args(words)
    from dylo_moe.report.run_page import write_report

    print(write_report(arguments.run, arguments.output))
    return 0
