"""The folder of a training run: its name, its settings file, its numbered checkpoints, and unfinished saves."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.owner import OWNER
from dylo_moe.utils.whole_folders import left_by_kill

NEW_RUN = "new"

RUNS = Path("runs")
"""The folder of the runs that were given none."""

CONFIG_FILE = "config.yaml"

STREAM_FILE = "stream.json"
"""A file that a stream's folder has, but a run's does not."""

GATE_START_FILE = "gate_start.safetensors"

NUMBERED = re.compile(r"checkpoint-(\d+)")

UNFINISHED = re.compile(r"\.(checkpoint|checkpoint-\d+)\.(partial|(old\.)?[a-z0-9_]{8})")
"""The hidden folders of saves and deletions."""


def new_output_dir(wanted: str) -> Path:
    """Make the folder of a new run: the wanted one, which must be new or empty, or for `new` one named by the time.

    Raises:
        UsageError: when the wanted folder already holds something.
    """
    if wanted == NEW_RUN:
        path = fresh_folder(RUNS, time.strftime("%Y%m%d-%H%M%S"))
    else:
        if problem := output_dir_problem(wanted):
            raise UsageError(problem)
        path = Path(wanted)
    path.mkdir(parents=True, exist_ok=True)
    return path


def output_dir_problem(wanted: str) -> str | None:
    """Why a new run cannot be written where `output_dir` says; None: it can."""
    if not wanted.strip():
        return f"output_dir is {wanted!r}; name a new folder"
    path = RUNS if wanted == NEW_RUN else Path(wanted)
    try:
        if path.exists() and not path.is_dir():
            return f"output_dir {path} is a file; name a new folder"
        if wanted != NEW_RUN and path.exists() and any(item.name != OWNER for item in path.iterdir()):
            return f"output_dir {path} is not empty; choose a new one, so that no earlier run is overwritten"
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            return f"output_dir {path} cannot be made: {existing} is a file"
        if not os.access(existing, os.W_OK):
            return f"output_dir {path} cannot be made: {existing} may not be written"
    except OSError as error:
        return f"output_dir {path} cannot be used: {error.strerror}"
    if existing == path.absolute():
        return None
    try:
        # Some folders, such as /proc, take no new one although they may be written. A name of its own is tried, not
        # the wanted one, because the other processes of a run look at that at the same time.
        Path(tempfile.mkdtemp(prefix=".dylora-", dir=existing)).rmdir()
    except OSError as error:
        return f"output_dir {path} cannot be made: no folder can be made in {existing} ({error.strerror})"
    return None


def fresh_folder(parent: Path, name: str) -> Path:
    """A path in `parent` that is free: `name`, or `name` with a number. The folder is not made."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return next(
        path
        for path in (parent / (plain + end) for end in ["", *(f"-{n}" for n in range(2, 1000))])
        if not path.exists()
    )


def save_config(settings: dict[str, Any], path: Path) -> None:
    """Write the settings of a run, as a recipe that `--config` reads."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder within the run's folder."""
    return f"checkpoint-{step}"


def unfinished(checkpoint: Path) -> Path:
    """The hidden folder that a checkpoint is written in and deleted from, so that no part of one looks complete."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def checkpoints_in(run: Path) -> list[tuple[int, Path]]:
    """The numbered checkpoints of a run with their steps, oldest first."""
    found = [(NUMBERED.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir()] if run.is_dir() else []
    return sorted((int(match[1]), path) for match, path in found if match)


def shows_training(run: Path) -> bool:
    """Whether a run or a stream has trained anything that its folder shows: there is a checkpoint, or a logged step."""
    if any(run.rglob(MANIFEST)):
        return True
    lines = [line for file in run.rglob("metrics.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]
    return any(_logged_step(line) > 0 for line in lines)


def _logged_step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that a full disk or a kill has cut off
        return 0


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill on the way leaves none that looks complete."""
    hidden = unfinished(checkpoint)
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear_unfinished(run: Path) -> list[str]:
    """Delete what interrupted saves left behind, and put back what one had moved aside; returns the deleted names.

    No other process may be writing there.
    """
    found = {path: match for path in run.iterdir() if (match := UNFINISHED.fullmatch(path.name)) and path.is_dir()}
    for name in sorted({match[1] for match in found.values()}):
        older = left_by_kill(run / name)
        if older is not None:
            older.rename(run / name)
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in found)


def set_aside(run: Path, newest: Path | None) -> list[str]:
    """Rename the incomplete checkpoints that are newer than `newest` to broken-..., so that nothing resumes from them.

    Args:
        newest: the newest complete checkpoint; None: there is none.

    Returns:
        The new names.
    """
    numbered = checkpoints_in(run)
    after = 0 if newest is None else next(place for place, (_, path) in enumerate(numbered, 1) if path == newest)
    names = []
    for _, checkpoint in numbered[after:]:
        target = next(
            path
            for path in (run / f"broken-{checkpoint.name}{end}" for end in ["", *(f"-{n}" for n in range(2, 1000))])
            if not path.exists()
        )
        checkpoint.rename(target)
        names.append(target.name)
    return names
