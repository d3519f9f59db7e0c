"""`dylora report`: one HTML page about a run, a stream, a comparison or a checkpoint."""

from __future__ import annotations

from dylo_moe.parsing.plain import PlainParser


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    parser = make_parser()
    if parser.shows_help(words or ["--help"]):
        return 0
    values = parser.read(words)
    from dylo_moe.report.pages import write_report  # late: a help needs no page
    from dylo_moe.utils.screen import Screen

    Screen("report").answer(str(write_report(values["folder"], values["output"])))
    return 0


def make_parser() -> PlainParser:
    """The parser of the command."""
    parser = PlainParser(
        "dylora report",
        "FOLDER [--output FILE]",
        "Write one HTML page about a run, a stream or a comparison: losses, routing, matrix, verdicts, settings. It "
        "needs no network.",
        ["dylora report runs/code", "dylora report runs/skills --output skills.html"],
    )
    parser.add_word(
        "folder",
        metavar="FOLDER",
        help="What dylora train, stream or compare wrote, finished or not; or a checkpoint, for its run.",
    )
    parser.add_flag(
        "--output",
        help="The page to write; default: report.html in that folder, or CHECKPOINT-report.html beside a checkpoint "
        "that is not in the folder of a run or stream.",
    )
    return parser
