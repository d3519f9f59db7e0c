"""`dylora report`: one HTML page about a run, a stream, a comparison or a checkpoint."""

from __future__ import annotations

import argparse


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="dylora report",
        allow_abbrev=False,
        description="Write one HTML page about a run, a stream or a comparison: losses, routing, matrix, verdicts, "
        "settings. It needs no network.",
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="what dylora train, stream or compare wrote, finished or not; or a checkpoint, for its run",
    )
    parser.add_argument(
        "--output",
        help="the page to write; default: report.html in that folder, or CHECKPOINT-report.html beside a checkpoint "
        "that is not in the folder of a run or stream",
    )
    arguments = parser.parse_args(words)
    from dylo_moe.report.pages import write_report  # late: a help needs no page

    print(write_report(arguments.folder, arguments.output))
    return 0
