"""Ways to alter what a checkpoint says, and to make its checksums agree again, as a careful forger would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dylo_moe.utils.typed_json import checksum


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within a JSON value; of a long list or object to the first three."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    few = list(keys)[:3] if len(keys) > 40 else list(keys)
    return [place for key in few for place in [(*above, key), *places(value[key], (*above, key))]]


def put(value: Any, place: Sequence[Any], new: Any) -> Any:
    """The same JSON value with another one at a place; it is changed."""
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return value


def rehash(folder: Path, *, files: Sequence[str]) -> None:
    """Write the hashes of these files, and the manifest's own checksum, as they are now."""
    manifest = json.loads((folder / "dylora.json").read_text())
    for name in files:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    if not isinstance(manifest.get("checksum"), str) or len(manifest["checksum"]) == 64:
        manifest["checksum"] = checksum(manifest, leave_out="checksum")
    (folder / "dylora.json").write_text(json.dumps(manifest))
