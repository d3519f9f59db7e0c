"""The folder of a training run: its name, its settings file, its numbered checkpoints, and unfinished saves."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from dylo_moe.utils.errors import UsageError

NEW_RUN = "new"

CONFIG_FILE = "config.yaml"

GATE_START_FILE = "gate_start.safetensors"

NUMBERED = re.compile(r"checkpoint-(\d+)")

UNFINISHED = re.compile(r"\.checkpoint-\d+\.(partial|old\..*)")


def new_output_dir(wanted: str) -> Path:
    """The run's folder: the wanted one, which must be new or empty, or for `new` one named by the time.

    Raises:
        UsageError: when the wanted folder already holds something.
    """
    if wanted == NEW_RUN:
        path = fresh_folder(Path("runs"), time.strftime("%Y%m%d-%H%M%S"))
    else:
        path = Path(wanted)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"output_dir {path} is not empty; choose a new one, so that no earlier run is overwritten")
    path.mkdir(parents=True, exist_ok=True)
    return path


def fresh_folder(parent: Path, name: str) -> Path:
    """`parent/name`, numbered where that is taken; not made."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return next(
        path
        for path in (parent / (plain + end) for end in ["", *(f"-{n}" for n in range(2, 1000))])
        if not path.exists()
    )


def save_config(settings: dict[str, Any], path: Path) -> None:
    """Write what a run was resolved to, as a recipe that `--config` reads."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def checkpoint_name(step: int) -> str:
    """A checkpoint's folder in its run's."""
    return f"checkpoint-{step}"


def unfinished(checkpoint: Path) -> Path:
    """That folder until it is whole, and while it is deleted."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def checkpoints_in(run: Path) -> list[tuple[int, Path]]:
    """The numbered checkpoints of a run with their steps, oldest first."""
    found = [(NUMBERED.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir()] if run.is_dir() else []
    return sorted((int(match[1]), path) for match, path in found if match)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; killed on the way, it leaves none that looks whole."""
    hidden = unfinished(checkpoint)
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear_unfinished(run: Path) -> list[str]:
    """Delete what interrupted saves left behind; returns the names."""
    names = sorted(path.name for path in run.iterdir() if UNFINISHED.fullmatch(path.name))
    for name in names:
        shutil.rmtree(run / name, ignore_errors=True)
    return names


def set_aside(run: Path, newest: Path | None) -> list[str]:
    """Rename the checkpoints that come after `newest`, which are not whole, so that none takes them for one."""
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
