"""Save a DyLoRAMoE model to a checkpoint folder: written aside, verified by hashes, renamed into place."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save, save_file
from torch import Tensor

from dylo_moe.base.fingerprint import differences, fingerprint, some_of
from dylo_moe.base.frozen import quantization
from dylo_moe.experts.invocation import invocation_of
from dylo_moe.model.base_merge import check_unmerged
from dylo_moe.model.checkpoint import (
    ADAPTER_FILES,
    CARD,
    LIBRARY_FILE,
    OWN_ENTRIES,
    ROUTER_FILE,
    CheckpointError,
    move_in,
    plain_config,
)
from dylo_moe.model.manifest import CHECKSUM, FORMAT_VERSION, format_version
from dylo_moe.model.model_card import model_card
from dylo_moe.model.nonfinite import broken_weights
from dylo_moe.model.peft_model import RoutedPeftModel
from dylo_moe.utils.atomic_files import files_below, listing, sync
from dylo_moe.utils.errors import DyLoRAWarning
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.harmless import harmless_logger
from dylo_moe.utils.typed_json import checksum
from dylo_moe.utils.whole_folders import hidden_of, replace_folder, written_aside
from dylo_moe.utils.words import listed
from dylo_moe.utils.write_errors import as_os_errors, why_not_saved

LOGGER = harmless_logger(__name__)

_NO_TENSORS = save({}, {"format": "pt"})


def save_checkpoint(
    model: RoutedPeftModel,
    path: str | os.PathLike[str],
    *,
    beside: bool = False,
    training: dict[str, Any] | None = None,
    losses: dict[str, dict[str, float]] | None = None,
) -> None:
    """Write `model`'s experts and router to the folder `path` atomically.

    Args:
        training, losses: as of `write_files`.
        beside: leave other files of the folder where they are, as the stock Trainer needs it: its output folder
            also holds its numbered checkpoints, and a README.md that it wrote. They cannot be exchanged at once, so
            that a kill may leave a part of them; the next reader or save then moves the others in.

    Raises:
        ValueError: for a folder that holds other files, and weights with NaN or infinity.
        CheckpointError: where it cannot be written, as on a full disk; what was there before stays as it was.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot save to {target}: it is a file")
    foreign, for_trainer = _foreign_files(target), beside
    beside = beside and bool(foreign)
    if beside:
        foreign = [name for name in foreign if name.split("/")[0] in OWN_ENTRIES]
    if foreign:
        raise ValueError(
            f"cannot save to {target}: it holds other files ({', '.join(foreign[:3])}); choose a new folder"
        )
    check_finite(model, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(target, within=target if beside else None) as aside:
            write_files(model, aside, training=training, losses=losses, for_trainer=for_trainer)
            if beside:
                move_in(aside, target)
            else:
                replace_folder(aside, target)
    except OSError as error:
        state = "what was there stays as it was" if target.exists() else "nothing of it was kept"
        raise CheckpointError(f"cannot save {target}: {why_not_saved(target, error)}; {state}") from error
    LOGGER.info("saved %s", target)


def check_base_unchanged(model: RoutedPeftModel, now: dict[str, Any]) -> None:
    """Warn where the frozen base is no longer what it was when the model was made, for no checkpoint holds it.

    Args:
        now: the base's fingerprint.

    Raises:
        ValueError: while an expert is merged into it.
    """
    check_unmerged(model.base, "save the model, whose base is in no checkpoint")
    changed = [] if model.base_fingerprint is None else differences(model.base_fingerprint, now)
    if changed:
        warnings.warn(
            f"the frozen base was changed since the model was made: {some_of(changed)}. No checkpoint holds the base, "
            "so that this one needs a base with the same changes; save that too (base.save_pretrained)",
            DyLoRAWarning,
            stacklevel=2,
        )


def check_finite(model: RoutedPeftModel, target: Path) -> None:
    """Raises ValueError, before anything is written to `target`, for weights with NaN or infinity."""
    broken = broken_weights(model.experts, model.router)
    if broken:
        raise ValueError(f"cannot save to {target}: NaN or infinity in {listed(broken)}; nothing was written")


def write_files(
    model: RoutedPeftModel,
    folder: Path,
    *,
    training: dict[str, Any] | None = None,
    losses: dict[str, dict[str, float]] | None = None,
    for_trainer: bool = False,
) -> None:
    """Write the files of a checkpoint into an existing folder, the manifest last, which lists all the others.

    Args:
        training: the record from which a run resumes; kept in the manifest.
        losses: held-out losses by dataset, "before" and "after" training, for the card.
        for_trainer: for the stock Trainer, which writes a README.md of its own, and loads a checkpoint (the best one,
            or to resume) only where it finds a file of that name: an empty one stands there.
    """
    for expert in model.experts.everyone:
        name = f"experts/{expert.name}"
        (folder / name).mkdir(parents=True)
        save_tensors(model.experts.state(expert.name), folder / name / ADAPTER_FILES[1])
        config = LoraConfig(**plain_config(model.peft_config[expert.name]))
        config.inference_mode = True
        config.base_model_name_or_path = model.base_id or None
        config.alora_invocation_tokens = invocation_of(model.router_config)
        config.save_pretrained(str(folder / name))
        _sort_lists(folder / name / ADAPTER_FILES[0])
    save_tensors(model.router.state_dict(), folder / ROUTER_FILE)
    now = fingerprint(model.base)
    check_base_unchanged(model, now)
    if model.growth is not None:
        save_tensors(model.growth.library.tensors(), folder / LIBRARY_FILE)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "base": {
            "id": model.base_id,
            "revision": model.base_revision,
            "quantization": quantization(model.base),
            "fingerprint": now,
        },
        "router": asdict(model.router_config),
        "balance_coefficient": model.balance_coefficient,
        "lora": plain_config(model.experts.lora),
        "experts": [asdict(expert) for expert in model.experts],
        "growth": None,
    }
    if model.experts.shared is not None:
        manifest["shared"] = asdict(model.experts.shared)
        manifest["format_version"] = format_version(manifest)
    if model.growth is not None:
        manifest["growth"] = {
            "allow_expert_growth": model.allow_expert_growth,
            "config": asdict(model.growth.config),
            "members": list(model.router.names),
            "skills": model.growth.library.record(),
        }
    if training is not None:
        manifest["training"] = training
    if for_trainer:
        (folder / ADAPTER_FILES[1]).write_bytes(_NO_TENSORS)
    else:
        known = training or {}
        card = model_card(manifest, known.get("facts"), losses, known.get("settings"), known.get("step"))
        (folder / CARD).write_text(card, encoding="utf-8")
    manifest["files"] = listing(folder)
    for name in manifest["files"]:
        sync(folder / name)
    manifest[CHECKSUM] = checksum(json.loads(json.dumps(manifest)), leave_out=CHECKSUM)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)


def _foreign_files(folder: Path) -> list[str]:
    """Files in a folder that no checkpoint of ours put there."""
    if not folder.is_dir():
        return []
    try:
        own = {*json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"], MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    empty = folder / ADAPTER_FILES[1]
    if empty.is_file() and empty.read_bytes() == _NO_TENSORS:  # the Trainer copies it when it pushes to the hub
        own.add(empty.name)
    leftovers = {path.name for path in hidden_of(folder, folder)}
    return sorted(name for name in files_below(folder) - own if name.split("/")[0] not in leftovers)


def _sort_lists(path: Path) -> None:
    """PEFT writes sets in the order of the process; the same config should be the same bytes."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values.get(name), list):
            values[name].sort()
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors of any device as one safetensors file. Raises OSError where it cannot be written."""
    with as_os_errors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path, {"format": "pt"})
