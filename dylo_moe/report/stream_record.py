"""Read what the folder of a stream holds, even if the stream was killed or is still running."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.evaluation.loss_matrix import MATRIX, Matrix, read_matrix
from dylo_moe.report.html import REPORT
from dylo_moe.report.run_record import read_mapping
from dylo_moe.training.run_folder import STREAM_FILE
from dylo_moe.utils.words import counted


class StreamRecord(NamedTuple):
    """A stream as its files describe it; what they do not hold is empty."""

    name: str
    """The name of the stream's folder."""
    matrix: Matrix
    settings: dict[str, Any]
    is_finished: bool | None
    """Whether the stream has ended; None if that is not known."""
    pages: list[Path | None]
    """The page about the run of each stage of the matrix; None where there is none."""
    missing: list[str]
    """Sentences about files that are not there or cannot be read."""


def is_stream(folder: Path) -> bool:
    """Whether a folder is that of a stream, rather than of a single run."""
    return any((folder / name).is_file() for name in (STREAM_FILE, MATRIX))


def read_stream(folder: Path) -> StreamRecord:
    """Read the files of a stream that are there; `missing` tells about the others."""
    missing: list[str] = []
    state = read_mapping(folder / STREAM_FILE, missing, "whether the stream has ended is not known")
    settings = read_mapping(folder / "config.yaml", missing, "the configuration is not known")
    try:
        matrix = read_matrix(folder / MATRIX)
    except FileNotFoundError:
        matrix = Matrix([])
        missing.append(f"{MATRIX} is missing: nothing was measured yet")
    except (OSError, ValueError) as error:
        matrix = Matrix([])
        missing.append(f"{MATRIX} cannot be read: {error}")
    is_finished = state["state"] == "finished" if isinstance(state.get("state"), str) else None
    if is_finished is False:
        verb = "is" if len(matrix.stages) == 1 else "are"
        stages = counted(len(matrix.stages), "stage")
        missing.append(f"the stream has not ended, or did not end well: {stages} {verb} measured")
    listed = state.get("stages") if isinstance(state.get("stages"), list) else []
    pages = [_page(folder, place, listed) for place in range(len(matrix.stages))]
    return StreamRecord(folder.resolve().name, matrix, settings, is_finished, pages, missing)


def _page(folder: Path, place: int, listed: Any) -> Path | None:
    """The page about a stage's run, if there is one inside the stream's folder."""
    entry = listed[place] if place < len(listed) else None
    named = entry.get("folder") if isinstance(entry, dict) else None
    found = [folder / named] if isinstance(named, str) and "\0" not in named else []
    found += sorted((folder / "stages").glob(f"{place + 1:02d}_*"))
    pages = (path.resolve() / REPORT for path in found)
    return next((page for page in pages if page.is_relative_to(folder.resolve() / "stages") and page.is_file()), None)
