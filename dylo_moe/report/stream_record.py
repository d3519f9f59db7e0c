"""What the folder of a stream tells, whole or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dylo_moe.evaluation.loss_matrix import MATRIX, Matrix, read_matrix
from dylo_moe.report.html import REPORT

STREAM = "stream.json"
"""What tells a stream's folder from a run's."""


class StreamRecord(NamedTuple):
    """A stream as its files tell it; what they do not tell is empty."""

    name: str
    """Of the folder."""
    matrix: Matrix
    settings: dict[str, Any]
    is_finished: bool | None
    """None: not known."""
    pages: list[Path | None]
    """Of each stage of the matrix: the page about its run, where there is one."""
    missing: list[str]
    """What is not there, or cannot be read, in sentences."""


def is_stream(folder: Path) -> bool:
    """Whether a folder is a stream's, not a single run's."""
    return any((folder / name).is_file() for name in (STREAM, MATRIX))


def read_stream(folder: Path) -> StreamRecord:
    """Read what there is."""
    missing: list[str] = []
    state = _mapping(folder / STREAM, missing, "whether the stream has ended is not known")
    settings = _mapping(folder / "config.yaml", missing, "the configuration is not known")
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
        stages = "1 stage is" if len(matrix.stages) == 1 else f"{len(matrix.stages):,} stages are"
        missing.append(f"the stream has not ended, or did not end well: {stages} measured")
    listed = state.get("stages") if isinstance(state.get("stages"), list) else []
    pages = [_page(folder, place, listed) for place in range(len(matrix.stages))]
    return StreamRecord(folder.resolve().name, matrix, settings, is_finished, pages, missing)


def _page(folder: Path, place: int, listed: Any) -> Path | None:
    """The page about a stage, only if it lies inside the stream's folder."""
    entry = listed[place] if place < len(listed) else None
    named = entry.get("folder") if isinstance(entry, dict) else None
    found = [folder / named] if isinstance(named, str) and "\0" not in named else []
    found += sorted((folder / "stages").glob(f"{place + 1:02d}_*"))
    pages = (path.resolve() / REPORT for path in found)
    return next((page for page in pages if page.is_relative_to(folder.resolve() / "stages") and page.is_file()), None)


def _mapping(path: Path, missing: list[str], so: str) -> dict[str, Any]:
    """The content of a file of JSON or YAML."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"{path.name} is missing: {so}")
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        missing.append(f"{path.name} cannot be read ({type(error).__name__}): {so}")
        return {}
    if isinstance(found, dict):
        return {str(name): value for name, value in found.items()}
    missing.append(f"{path.name} holds no settings: {so}")
    return {}
