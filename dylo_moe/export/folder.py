"""A folder that is there whole or not at all, and what lies in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import replace_folder
from ..whole_file import sha256


def check_free(target: Path) -> None:
    """Raises ValueError where something lies that an export would replace."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output {target} exists and is not an empty folder; name a new one")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, put in its place when all went well, and removed when not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors keeps its files from all other users, such as a server's
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # the rename must not reach the disk before what it names
        replace_folder(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def files_below(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file, by its path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths
    }
