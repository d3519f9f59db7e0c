"""What a checkpoint's manifest says of its format and its experts; read without PyTorch, as a page needs it."""

from __future__ import annotations

from typing import Any

from dylo_moe.routing.config import BASE, SHARED

FORMAT_VERSION, SHARED_FORMAT_VERSION = 1, 2
"""The format of a checkpoint without a shared expert, and with one, which older readers would pass over in silence."""

CHECKSUM = "checksum"
"""The entry of a manifest that holds the sha256 of the content of all others."""


def expert_entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a manifest's experts, in gate order; that of the shared one, if any, comes last."""
    return [*manifest["experts"], *([manifest["shared"]] if "shared" in manifest else [])]


def format_version(manifest: dict[str, Any]) -> int:
    """The format that a manifest of this content has."""
    return SHARED_FORMAT_VERSION if "shared" in manifest else FORMAT_VERSION


def expert_problem(manifest: dict[str, Any], expert: str | None, *, or_base: bool = True) -> str | None:
    """What is wrong with the name of an expert, before any weights are read; None: nothing, or no name is given.

    Args:
        manifest: what `read_manifest` returned.
        or_base: whether `base`, the unchanged model, may be named too, and the shared expert alone.
    """
    names = [entry["name"] for entry in manifest["experts"]]
    others = {BASE: "the unchanged model"} | ({SHARED: "the shared expert alone"} if SHARED in manifest else {})
    if expert is None or expert in names or (or_base and expert in others):
        return None
    more = "".join(f", and {name} is {what}" for name, what in others.items()) if or_base else ""
    return f"expert is {expert!r}; the checkpoint has {', '.join(names)}{more}"
