"""Find out what a folder holds, and write the page about it: one HTML file without network and scripts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dylo_moe.report.comparison_page import comparison_page
from dylo_moe.report.comparison_record import is_comparison, read_comparison
from dylo_moe.report.html import REPORT
from dylo_moe.report.run_page import run_page
from dylo_moe.report.run_record import is_checkpoint, is_run, read_checkpoint, read_record
from dylo_moe.report.stream_page import stream_page
from dylo_moe.report.stream_record import is_stream, read_stream
from dylo_moe.utils.atomic_files import write_whole
from dylo_moe.utils.words import listed

COMPARISON, STREAM, RUN, CHECKPOINT = "comparison", "stream", "run", "checkpoint"

EXPECTED = (
    "a run (config.yaml, metrics.jsonl or run.json), a stream (stream.json or matrix.json), a comparison "
    "(compare.json) or a checkpoint (dylora.json)"
)
"""What a page can be about, each with the files that it is known by."""


class Subject(NamedTuple):
    """What a page is about."""

    kind: str
    folder: Path

    @property
    def page(self) -> Path:
        """Where the page is written by default; beside a checkpoint, whose own files are listed in it."""
        name = self.folder.resolve().name
        return self.folder.parent / f"{name}-{REPORT}" if self.kind == CHECKPOINT else self.folder / REPORT


def write_report(folder: str, output: str | None = None) -> Path:
    """Write the page about what is in `folder`; returns its path, by default report.html in that folder.

    The page about a checkpoint in the folder of a run or stream is that of the run or stream.

    Raises:
        ValueError: for a folder that holds nothing of the kind, or an output that is a folder.
    """
    subject = find_subject(Path(folder))
    target = subject.page if output is None else Path(output)
    if target.is_dir():
        raise ValueError(f"output {target} is a folder; name a file, such as {target / REPORT}")
    if subject.kind == COMPARISON:
        text = comparison_page(read_comparison(subject.folder), target.parent)
    elif subject.kind == STREAM:
        text = stream_page(read_stream(subject.folder), target.parent)
    else:
        text = run_page((read_record if subject.kind == RUN else read_checkpoint)(subject.folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text.encode("utf-8", errors="replace"))  # a text may hold half a surrogate pair
    return target


def find_subject(folder: Path) -> Subject:
    """Find what a folder is about.

    Raises:
        ValueError: for anything else, with what was found and what is expected.
    """
    kind = _kind(folder)
    if kind == CHECKPOINT:
        around = folder.parent if folder.name else folder.resolve().parent
        kind_around = _kind(around)
        return Subject(kind_around, around) if kind_around in (RUN, STREAM) else Subject(kind, folder)
    if kind is not None:
        return Subject(kind, folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name the folder of {EXPECTED}")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name that of {EXPECTED}")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    known = [name for name in names if _kind(folder / name)]
    found = f"holds {listed(names)}" if names else "is empty"
    hint = f"; name one of the folders in it, such as {folder / known[-1]}" if known else ""
    raise ValueError(f"{folder} {found}, and is not the folder of {EXPECTED}{hint}")


def _kind(folder: Path) -> str | None:
    kinds = {COMPARISON: is_comparison, STREAM: is_stream, RUN: is_run, CHECKPOINT: is_checkpoint}
    return next((kind for kind, holds in kinds.items() if holds(folder)), None)
