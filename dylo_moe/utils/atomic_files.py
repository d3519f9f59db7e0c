"""Atomic writes of files, and hashes that recognise files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: beside its place, then renamed. A failure leaves the old file."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file to the disk, so that a later rename cannot reach the disk before its content."""
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


def check_free(target: Path) -> None:
    """Raise ValueError if an export would replace something."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output {target} exists and is not an empty folder; name a new one")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
