"""Load a DyLoRAMoE model from a checkpoint folder, after checking every file and the base."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe.base.fingerprint import base_identity, compare_base, resized_embeddings, some_of
from dylo_moe.base.frozen import check_base, untouched_on_failure
from dylo_moe.base.loading import load_base
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.continual.growth import Growth
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.experts.adapter import state_problems
from dylo_moe.experts.expert import Expert
from dylo_moe.model.checkpoint import (
    ADAPTER_FILES,
    LIBRARY_FILE,
    ROUTER_FILE,
    CheckpointError,
    checkpoint_in,
    named_base,
    plain_config,
    read_manifest,
)
from dylo_moe.model.manifest import expert_entries
from dylo_moe.model.manifest_check import lora_problems
from dylo_moe.model.peft_model import RoutedPeftModel
from dylo_moe.model.probe import probe
from dylo_moe.routing.config import SHARED, RouterConfig
from dylo_moe.routing.features import NUM_PLACES
from dylo_moe.utils.errors import DyLoRAWarning
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.harmless import harmless_logger
from dylo_moe.utils.typed_json import read_json
from dylo_moe.utils.words import counted

LOGGER = harmless_logger(__name__)

Model = TypeVar("Model", bound=RoutedPeftModel)


def load_checkpoint(
    cls: type[Model], path: str | os.PathLike[str], base: PreTrainedModel | str | None, **kwargs: Any
) -> Model:
    """Read the folder `path` onto a base. See `DyLoRAMoE.from_pretrained`."""
    folder = checkpoint_in(path)
    manifest = read_manifest(folder)
    if base is None:
        base, revision = named_base(folder, manifest)
        kwargs.setdefault("revision", revision)
        if manifest["base"].get("quantization") is not None:
            kwargs.setdefault("quantization_config", manifest["base"]["quantization"])
    if isinstance(base, str):
        base = load_base(base, **kwargs)
    elif kwargs:
        raise ValueError(f"base is already loaded, so {', '.join(sorted(kwargs))} cannot apply")
    check_base(base)
    _check_same_base(folder, manifest, base)
    with untouched_on_failure(base):
        model = _build(cls, folder, manifest, base)
    LOGGER.info(
        "loaded %s: %s on %s", folder, counted(len(model.experts), "expert"), model.base_id or "an unnamed base"
    )
    return model


def load_into(model: RoutedPeftModel, path: str | os.PathLike[str]) -> dict[str, Any]:
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
        ("lora", manifest["lora"], plain_config(model.experts.lora)),
    ]
    shared = Expert(**manifest["shared"]) if "shared" in manifest else None
    if shared != model.experts.shared:
        differences.append(f"its shared expert is {shared}, here {model.experts.shared}")
    differences += [f"{name} is {saved}, here {ours}" for name, saved, ours in pairs if saved != ours]
    if differences:
        raise CheckpointError(f"checkpoint {folder} is of another model: " + "; ".join(differences))
    entries = expert_entries(manifest)
    states = [_load_tensors(folder / "experts" / entry["name"] / ADAPTER_FILES[1]) for entry in entries]
    router_state = _load_tensors(folder / ROUTER_FILE)
    library = load_library(folder, manifest)
    for entry, state in zip(entries, states, strict=True):
        _load_expert(model, entry, state, folder)
    model.experts.pack()
    _load_router(model, router_state, folder)
    _load_growth(model, manifest, library)
    return manifest


def _check_same_base(folder: Path, manifest: dict[str, Any], base: PreTrainedModel) -> None:
    differences = _base_differences(manifest["base"], base)
    if differences:
        shown = some_of(differences)
        if resized := resized_embeddings(manifest["base"]["fingerprint"], base):
            shown += (
                f". Its token embeddings had {resized[0]:,} rows, here they have {resized[1]:,}: if they were resized "
                "after loading, pass as base= the base with those same rows, from where it was saved"
            )
        raise CheckpointError(
            f"checkpoint {folder} was trained on another base ({manifest['base']['id'] or 'unnamed'}): {shown}"
        )


def _base_differences(saved: dict[str, Any], base: PreTrainedModel) -> list[str]:
    if not saved["fingerprint"]["quantized"] and getattr(base, "hf_quantizer", None) is None:
        return compare_base(saved["fingerprint"], base)
    warnings.warn(
        "a quantised base has no values to sample; it is recognised by its id and revision only",
        DyLoRAWarning,
        stacklevel=3,
    )
    was, found = (saved["id"], saved["revision"]), base_identity(base)
    return [] if was == found else [f"its id and revision are {found}, were {was}"]


def _build(cls: type[Model], folder: Path, manifest: dict[str, Any], base: PreTrainedModel) -> Model:
    configs: dict[str, LoraConfig] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for entry in expert_entries(manifest):
        files = [folder / "experts" / entry["name"] / file for file in ADAPTER_FILES]
        states[entry["name"]] = _load_tensors(files[1])
        configs[entry["name"]] = _load_config(files[0], entry, states[entry["name"]])
    router_state, library = _load_tensors(folder / ROUTER_FILE), load_library(folder, manifest)
    router = RouterConfig(**manifest["router"])
    try:
        model = _empty_model(cls, manifest, base, configs, router)
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise CheckpointError(f"checkpoint {folder} fits no model: {error}") from error
    for entry in expert_entries(manifest):
        _load_expert(model, entry, states[entry["name"]], folder)
    model.experts.pack()
    if manifest.get("growth") is not None:
        model.router.arrange(manifest["growth"]["members"])
    _load_router(model, router_state, folder)
    _load_growth(model, manifest, library)
    model.base_id, model.base_revision = manifest["base"]["id"], manifest["base"]["revision"]
    return model.eval()


def _empty_model(
    cls: type[Model],
    manifest: dict[str, Any],
    base: PreTrainedModel,
    configs: dict[str, LoraConfig],
    router: RouterConfig,
) -> Model:
    """The model that a manifest describes, before it has the weights."""
    entries = manifest["experts"]
    first = entries[0]["name"]
    model = cls(
        base,
        seen=probe(base, router=router),
        lora=configs[first],
        router=router,
        names=[first],
        balance_coefficient=manifest["balance_coefficient"],
        shared=configs.get(SHARED),
    )
    model.experts.lora = LoraConfig(**manifest["lora"])
    for entry in entries[1:]:
        model.experts.add(entry["name"], configs[entry["name"]], mature=entry["mature"], skill=entry["skill"])
        model.router.add_row(entry["name"])
    model.experts.pack()
    return model


def _load_config(path: Path, entry: dict[str, Any], state: dict[str, Tensor]) -> LoraConfig:
    """An expert's config, checked before anything is made by it."""
    try:
        values = read_json(path)
        problems = lora_problems(values, "it")
        if problems:
            raise ValueError("; ".join(problems[:5]))
        if values.get("peft_type") != "LORA":
            problems = [f"peft_type is {values.get('peft_type')!r}; it must be 'LORA'"]
        ranks = {tensor.shape[0] for name, tensor in state.items() if ".lora_A." in name and tensor.dim()}
        is_of_rank = values["r"] == entry["rank"] and (bool(values.get("rank_pattern")) or entry["rank"] in ranks)
        if not problems and not is_of_rank:
            problems = [f"r is {values['r']}, of matrices of rank {sorted(ranks)}, and {MANIFEST} says {entry['rank']}"]
        if problems:
            raise ValueError("; ".join(problems))
        config = LoraConfig.from_pretrained(str(path.parent))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    config.inference_mode = False
    config.alora_invocation_tokens = None  # which tokens it reads is the router's to say
    return config


def _load_expert(model: RoutedPeftModel, entry: dict[str, Any], state: dict[str, Tensor], folder: Path) -> None:
    name = entry["name"]
    problems = state_problems(model.experts.state(name), state)
    if problems:
        raise CheckpointError(f"{folder / 'experts' / name / ADAPTER_FILES[1]}: " + "; ".join(problems[:5]))
    model.experts.cast(name, next(iter(state.values())).dtype)
    model.experts.fill(name, state)
    expert = model.experts.find(name)
    if expert.parameters != entry["parameters"]:
        raise CheckpointError(
            f"{folder / MANIFEST} says that expert {name!r} has {entry['parameters']:,} parameters; it has "
            f"{expert.parameters:,}"
        )
    expert.mature, expert.skill, expert.trainable = entry["mature"], entry["skill"], entry["trainable"]


def _load_router(model: RoutedPeftModel, state: dict[str, Tensor], folder: Path) -> None:
    is_calibrated = "place_temperatures" in state  # a gate that was trained is not
    model.router.place_temperatures = torch.ones(NUM_PLACES, device=model.device) if is_calibrated else None
    problems = state_problems(model.router.state_dict(), state)
    if problems:
        raise CheckpointError(f"{folder / ROUTER_FILE}: " + "; ".join(problems[:5]))
    model.router.load_state_dict(state)
    model.router.keep_counts_on_first()


def load_library(folder: Path, manifest: dict[str, Any]) -> SkillLibrary | None:
    """The skill library of a checkpoint whose manifest was read; None for one that knows no skills."""
    if manifest.get("growth") is None:
        return None
    try:
        return SkillLibrary.restore(_load_tensors(folder / LIBRARY_FILE), manifest["growth"]["skills"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / LIBRARY_FILE}: {error}") from error


def _load_growth(model: RoutedPeftModel, manifest: dict[str, Any], library: SkillLibrary | None) -> None:
    """Restore what is known of skills, and make each expert as trainable as it was when it was saved."""
    if library is not None:
        growth = manifest["growth"]
        config = GrowthConfig(**growth["config"])
        model.growth = Growth(model, config=config, library=library, enabled=growth["allow_expert_growth"])
    model.apply_trainable()


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
