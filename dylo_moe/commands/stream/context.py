"""The objects that all steps of a stream share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.commands.stream.request import StreamRequest
from dylo_moe.data.collator import Collator
from dylo_moe.data.loading import LoadedData
from dylo_moe.training.stopping import StopRequest
from dylo_moe.utils.screen import Screen


class StreamContext(NamedTuple):
    """The objects that all steps of a stream share; they stay the same from its first stage to its last."""

    request: StreamRequest
    data: LoadedData
    collator: Collator
    folder: Path
    screen: Screen
    stop: StopRequest
    record: dict[str, Any]
    """The record that every checkpoint's manifest holds: settings, the rows' fingerprint, and facts of the run."""
