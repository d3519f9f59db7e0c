"""One call of `dylora export`, and what every record of one says: where it is from, and what a reader should know."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.commands.export.arguments import MERGED, VLLM, ExportArguments
from dylo_moe.routing.config import RESPONSE
from dylo_moe.utils.atomic_files import sha256
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.screen import Screen

EXPORT_FORMAT_VERSION = 1


class Export(NamedTuple):
    """One call of `dylora export`: its checkpoint, flags and output."""

    checkpoint: Path
    manifest: dict[str, Any]
    options: ExportArguments
    output: Path
    screen: Screen

    @property
    def base(self) -> dict[str, Any]:
        """The entry of the manifest that describes the base."""
        return self.manifest["base"]

    @property
    def adapts_prompts(self) -> bool:
        """Whether the experts will read prompts, which the checkpoint leaves to the base."""
        return self.options.to in (VLLM, MERGED) and self.manifest["router"]["granularity"] == RESPONSE


def origin(export: Export, kind: str) -> dict[str, Any]:
    """Make the part of the record that both kinds of export share."""
    checkpoint = {"sha256": sha256(export.checkpoint / MANIFEST)}
    base = {name: export.base[name] for name in ("id", "revision")} | {"quantization": export.base.get("quantization")}
    return {"format_version": EXPORT_FORMAT_VERSION, "kind": kind, "checkpoint": checkpoint, "base": base}


def of_quantised(export: Export, what: str) -> list[str]:
    """Make a note where the experts were trained on quantised weights; `what` says what follows from that."""
    if not export.base["fingerprint"]["quantized"]:
        return []
    return [f"The experts were trained on a base whose weights were quantised; {what}."]


def of_prompts(export: Export, why: str) -> list[str]:
    """Make a note where experts will read prompts for which they were not trained; `why` says what makes them."""
    if not export.adapts_prompts:
        return []
    return [
        f"These experts were trained on answers, behind prompts that the base reads (granularity {RESPONSE!r}); {why}, "
        "so that here they read the prompts too. `dylora export --to peft` writes adapters that do not."
    ]
