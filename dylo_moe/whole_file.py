"""A file that is there whole or not at all, and how it is known again; of a folder, all its files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the place and rename into it; a failure leaves what was there before."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """A rename must not reach the disk before what it names."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def files_below(folder: Path, scope: str = ".") -> set[str]:
    """Every file in a folder, or in a part of it, by its path in the folder."""
    return {file.relative_to(folder).as_posix() for file in (folder / scope).rglob("*") if not file.is_dir()}


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file in a folder, by its path in it."""
    return {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in sorted(files_below(folder))
    }
