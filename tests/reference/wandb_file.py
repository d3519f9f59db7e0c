"""The file that Weights & Biases writes without a server, read: blocks of records, as LevelDB keeps its log."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

HEADER_BYTES = 7
BLOCK_BYTES = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(data: bytes) -> list[bytes]:
    """The records' bytes. A block begins anywhere but in a record's header; each part has a checksum, its length and
    its kind in front."""
    assert data[:4] == b":W&B"
    found, parts, place = [], b"", HEADER_BYTES
    while place < len(data):
        left = BLOCK_BYTES - place % BLOCK_BYTES
        if left < HEADER_BYTES:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER_BYTES])
        place += HEADER_BYTES
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        parts += data[place : place + length]
        place += length
        if kind in (FULL, LAST):
            found.append(parts)
            parts = b""
    assert not parts
    return found


def records(run: Path) -> list[Any]:
    """Every record of an offline run's folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("*.wandb")
    return [Record.FromString(payload) for payload in payloads(path.read_bytes())]


def history(run: Path) -> list[dict[str, str]]:
    """What was logged, a mapping of names to JSON a call."""
    return [
        {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in records(run)
        if record.WhichOneof("record_type") == "history"
    ]
