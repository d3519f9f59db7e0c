"""Save a DyLoRAMoE model to a checkpoint folder, and load one from it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig
from peft.utils import set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe.base.fingerprint import base_identity, compare_base, fingerprint
from dylo_moe.base.frozen import check_base, quantization
from dylo_moe.base.loading import load_base
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.experts.adapter import state_problems
from dylo_moe.experts.expert import Expert
from dylo_moe.model.checkpoint import (
    ADAPTER_FILES,
    CARD,
    FORMAT_VERSION,
    LIBRARY_FILE,
    MANIFEST,
    OWN_ENTRIES,
    ROUTER_FILE,
    CheckpointError,
    _foreign_files,
    _load_tensors,
    _plain,
    _put_into,
    _save_tensors,
    _sort_lists,
    read_manifest,
)
from dylo_moe.model.model_card import model_card
from dylo_moe.model.nonfinite import broken_weights
from dylo_moe.routing.config import RouterConfig
from dylo_moe.utils.atomic_files import listing, replace_folder, sync
from dylo_moe.utils.words import listed

if TYPE_CHECKING:
    from dylo_moe.model.model import DyLoRAMoE


def save_checkpoint(
    model: DyLoRAMoE,
    path: str | os.PathLike[str],
    *,
    beside: bool = False,
    training: dict[str, Any] | None = None,
    losses: dict[str, dict[str, float]] | None = None,
) -> None:
    """Write `model`'s experts and router to the folder `path`, whole or not at all.

    Args:
        training, losses: as of `write_files`.
        beside: leave what else lies in the folder, as the Trainer wants it: its output folder also holds its
            numbered checkpoints, and a README.md of its own making. A crash may then leave no checkpoint, but never a
            mixture of two.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"cannot save to {target}: it is a file")
    foreign, with_card = _foreign_files(target), not beside
    beside = beside and bool(foreign)
    if beside:
        foreign = [name for name in foreign if name.split("/")[0] in OWN_ENTRIES]
    if foreign:
        raise ValueError(
            f"cannot save to {target}: it holds other files ({', '.join(foreign[:3])}); choose a new folder"
        )
    check_finite(model, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target if beside else target.parent))
    try:
        write_files(model, aside, training=training, losses=losses, with_card=with_card)
        if beside:
            _put_into(aside, target)
        else:
            replace_folder(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def check_finite(model: DyLoRAMoE, target: Path) -> None:
    """Raises ValueError, before anything is written to `target`, for weights with NaN or infinity."""
    broken = broken_weights(model.experts, model.router)
    if broken:
        raise ValueError(f"cannot save to {target}: NaN or infinity in {listed(broken)}; nothing was written")


def write_files(
    model: DyLoRAMoE,
    folder: Path,
    *,
    training: dict[str, Any] | None = None,
    losses: dict[str, dict[str, float]] | None = None,
    with_card: bool = True,
) -> None:
    """Write the files of a checkpoint into an existing folder, the manifest last; it lists all that lies there.

    Args:
        training: what a run must find again when it goes on from here; kept in the manifest.
        losses: held-out losses by dataset, "before" and "after" training, for the card.
        with_card: write the model card too.
    """
    for expert in model.experts:
        name = f"experts/{expert.name}"
        (folder / name).mkdir(parents=True)
        _save_tensors(model.experts.state(expert.name), folder / name / ADAPTER_FILES[1])
        config = LoraConfig(**_plain(model.peft_config[expert.name]))
        config.inference_mode = True
        config.base_model_name_or_path = model.base_id or None
        config.save_pretrained(str(folder / name))
        _sort_lists(folder / name / ADAPTER_FILES[0])
    _save_tensors(model.router.state_dict(), folder / ROUTER_FILE)
    if model.growth is not None:
        _save_tensors(model.growth.library.tensors(), folder / LIBRARY_FILE)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "base": {
            "id": model.base_id,
            "revision": model.base_revision,
            "quantization": quantization(model.base),
            "fingerprint": fingerprint(model.base),
        },
        "router": asdict(model.router_config),
        "balance_coefficient": model.balance_coefficient,
        "lora": _plain(model.experts.lora),
        "experts": [asdict(expert) for expert in model.experts],
        "growth": None,
    }
    if model.growth is not None:
        manifest["growth"] = {
            "allow_expert_growth": model.allow_expert_growth,
            "config": asdict(model.growth.config),
            "members": list(model.router.names),
            "skills": model.growth.library.record(),
        }
    if training is not None:
        manifest["training"] = training
    if with_card:
        known = training or {}
        card = model_card(manifest, known.get("facts"), losses, known.get("settings"), known.get("step"))
        (folder / CARD).write_text(card, encoding="utf-8")
    manifest["files"] = listing(folder)
    for name in manifest["files"]:
        sync(folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)


def load_checkpoint(
    cls: type[DyLoRAMoE], path: str | os.PathLike[str], base: PreTrainedModel | str | None, **kwargs: Any
) -> DyLoRAMoE:
    """Read the folder `path` onto a base. See `DyLoRAMoE.from_pretrained`."""
    folder = Path(path)
    manifest = read_manifest(folder)
    if base is None:
        base = manifest["base"]["id"]
        if not base:
            raise CheckpointError(f"checkpoint {folder} does not name its base; pass base=")
        kwargs.setdefault("revision", manifest["base"]["revision"])
        if manifest["base"].get("quantization") is not None:
            kwargs.setdefault("quantization_config", manifest["base"]["quantization"])
    if isinstance(base, str):
        base = load_base(base, **kwargs)
    elif kwargs:
        raise ValueError(f"base is already loaded, so {', '.join(sorted(kwargs))} cannot apply")
    check_base(base)
    _check_same_base(folder, manifest, base)
    return _build(cls, folder, manifest, base)


def load_into(model: DyLoRAMoE, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Put a checkpoint's experts and gate into a model that has the same ones; returns its manifest.

    Raises:
        CheckpointError: for a folder that is not whole, another base, or a model whose pool, router or LoRA settings
            differ; each difference is named, and the model stays as it was.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    _check_same_base(folder, manifest, model.base)
    here = {expert.name: expert for expert in model.experts}
    there = {entry["name"]: Expert(**entry) for entry in manifest["experts"]}
    differences = [
        f"expert {name!r} is only in {'the model' if name in here else 'it'}"
        for name in sorted(here.keys() ^ there.keys())
    ]
    differences += [f"{there[name]}, here {here[name]}" for name in here if name in there and here[name] != there[name]]
    if not differences and list(here) != list(there):
        differences.append(f"its experts are in the order {', '.join(there)}, here {', '.join(here)}")
    pairs = [
        ("router", RouterConfig(**manifest["router"]), model.router_config),
        ("balance_coefficient", manifest["balance_coefficient"], model.balance_coefficient),
        ("lora", manifest["lora"], _plain(model.experts.lora)),
    ]
    differences += [f"{name} is {saved}, here {ours}" for name, saved, ours in pairs if saved != ours]
    if differences:
        raise CheckpointError(f"checkpoint {folder} is of another model: " + "; ".join(differences))
    states = {name: _load_tensors(folder / "experts" / name / ADAPTER_FILES[1]) for name in there}
    router_state = _load_tensors(folder / ROUTER_FILE)
    library = _load_library(folder, manifest)
    for entry in manifest["experts"]:
        _load_expert(model, entry, states[entry["name"]], folder)
    model.experts.pack()
    _load_router(model, router_state, folder)
    _load_growth(model, manifest, library)
    return manifest


def _check_same_base(folder: Path, manifest: dict[str, Any], base: PreTrainedModel) -> None:
    differences = _base_differences(manifest["base"], base)
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise CheckpointError(
            f"checkpoint {folder} was trained on another base ({manifest['base']['id'] or 'unnamed'}): {shown}"
        )


def _base_differences(saved: dict[str, Any], base: PreTrainedModel) -> list[str]:
    if not saved["fingerprint"]["quantized"] and getattr(base, "hf_quantizer", None) is None:
        return compare_base(saved["fingerprint"], base)
    warnings.warn(
        "a quantised base has no values to sample; it is recognised by its id and revision only", stacklevel=3
    )
    was, found = (saved["id"], saved["revision"]), base_identity(base)
    return [] if was == found else [f"its id and revision are {found}, were {was}"]


def _build(cls: type[DyLoRAMoE], folder: Path, manifest: dict[str, Any], base: PreTrainedModel) -> DyLoRAMoE:
    entries = manifest["experts"]
    configs, states = {}, {}
    for entry in entries:
        files = [folder / "experts" / entry["name"] / file for file in ADAPTER_FILES]
        configs[entry["name"]] = PeftConfig.from_pretrained(str(files[0].parent))
        states[entry["name"]] = _load_tensors(files[1])
    router_state, library = _load_tensors(folder / ROUTER_FILE), _load_library(folder, manifest)
    first = entries[0]["name"]
    configs[first].inference_mode = False
    model = cls(
        base,
        lora=configs[first],
        router=RouterConfig(**manifest["router"]),
        names=[first],
        balance_coefficient=manifest["balance_coefficient"],
    )
    model.experts.lora = LoraConfig(**manifest["lora"])
    for entry in entries[1:]:
        configs[entry["name"]].inference_mode = False
        model.experts.add(entry["name"], configs[entry["name"]], mature=entry["mature"], skill=entry["skill"])
        model.router.add_row(entry["name"])
    model.experts.pack()
    for entry in entries:
        _load_expert(model, entry, states[entry["name"]], folder)
    model.experts.pack()
    if manifest.get("growth") is not None:
        model.router.arrange(manifest["growth"]["members"])
    _load_router(model, router_state, folder)
    _load_growth(model, manifest, library)
    model.base_id, model.base_revision = manifest["base"]["id"], manifest["base"]["revision"]
    return model.eval()


def _load_expert(model: DyLoRAMoE, entry: dict[str, Any], state: dict[str, Tensor], folder: Path) -> None:
    name = entry["name"]
    problems = state_problems(model.experts.state(name), state)
    if problems:
        raise CheckpointError(f"{folder / 'experts' / name / ADAPTER_FILES[1]}: " + "; ".join(problems[:5]))
    model.experts.cast(name, next(iter(state.values())).dtype)
    set_peft_model_state_dict(model, state, adapter_name=name)
    expert = model.experts[name]
    expert.mature, expert.skill, expert.trainable = entry["mature"], entry["skill"], entry["trainable"]


def _load_router(model: DyLoRAMoE, state: dict[str, Tensor], folder: Path) -> None:
    problems = state_problems(model.router.state_dict(), state)
    if problems:
        raise CheckpointError(f"{folder / ROUTER_FILE}: " + "; ".join(problems[:5]))
    model.router.load_state_dict(state)
    model.router.keep_counts_on_first()


def _load_library(folder: Path, manifest: dict[str, Any]) -> SkillLibrary | None:
    if manifest.get("growth") is None:
        return None
    try:
        return SkillLibrary.restore(_load_tensors(folder / LIBRARY_FILE), manifest["growth"]["skills"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / LIBRARY_FILE}: {error}") from error


def _load_growth(model: DyLoRAMoE, manifest: dict[str, Any], library: SkillLibrary | None) -> None:
    """Also makes each expert as trainable as it was saved."""
    if library is None:
        model.apply_trainable()
    else:
        growth = manifest["growth"]
        model.restore_growth(GrowthConfig(**growth["config"]), library, grows=growth["allow_expert_growth"])
