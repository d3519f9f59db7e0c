"""A file that is there whole or not at all, and how it is known again."""

from __future__ import annotations

import hashlib
from pathlib import Path


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
