"""A folder that is there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint import replace_folder
from ..whole_file import sync


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
                sync(path)
        replace_folder(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
