"""What a routed expert may be made of: a LoRA config, checked against the base before anything changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftConfig, TaskType
from peft.utils import load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe.base.stack import decoder_layers
from dylo_moe.experts.config import ALL_LINEAR, ExpertConfig, whole_if_it_is
from dylo_moe.experts.targets import (
    IS_OUTSIDE,
    ROUTABLE,
    Linears,
    find_linears,
    in_words,
    naming_exactly,
    shortest_names,
    targeted,
)
from dylo_moe.utils.words import listed

LORA_FIELDS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping",
    "peft_version", "runtime_config",
}  # fmt: skip
"""The fields of `LoraConfig` that an expert may set; any other that is not at its default is refused."""

WHY_NOT = {
    "use_dora": "DoRA rescales the whole weight, so its experts cannot be summed token by token",
    "target_parameters": "raw parameters have no layer of their own to route",
    "lora_bias": "a bias of an expert cannot be weighted with the stacked products",
    "bias": "training the base's biases would change the frozen base",
    "alora_invocation_tokens": "which tokens an expert reads is the router's to say, with RouterConfig(granularity="
    "'response', turns=...)",
    "modules_to_save": "a trained copy of a base module would change the base for every expert",
}


def lora_config(config: ExpertConfig) -> LoraConfig:
    """PEFT's config of the adapter that `config` describes; `routed_lora_config` fits it to a base."""
    targets = config.lora_targets
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=cast(int, config.lora_alpha),  # PEFT takes fractions too
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
    )


def config_at(config: LoraConfig, rank: int | None, *, alpha: float | None = None, whose: str) -> LoraConfig:
    """A copy of a LoRA config at another rank.

    Args:
        rank: default that of the config.
        alpha: default as follows from the rank, so that the scaling stays.
        whose: the config is, for messages.

    Raises:
        ValueError: for a rank that is none, or where patterns of the config set rank or alpha by layer.
    """
    config = copy.deepcopy(config)
    rank = config.r if rank is None else rank
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be a whole number of at least 1")
    if (rank != config.r or alpha is not None) and (config.rank_pattern or config.alpha_pattern):
        asked = f"rank {rank}" if alpha is None else f"rank {rank} with alpha {alpha}"
        raise ValueError(f"{asked} cannot apply: the {whose}'s rank_pattern or alpha_pattern sets them by layer")
    if alpha is None and rank != config.r:
        alpha = config.lora_alpha * (rank / config.r) ** (0.5 if config.use_rslora else 1.0)
    if alpha is not None:
        config.lora_alpha = cast(int, whole_if_it_is(alpha))  # PEFT takes fractions too
    config.r = rank
    return config


class Routed(NamedTuple):
    """How a LoRA config fits a base."""

    lora: LoraConfig
    """A copy that adapts exactly the linears that can be routed."""
    left_out: str | None
    """What it leaves out of those that were asked for, in words; None: nothing."""


def routed_lora_config(
    base: PreTrainedModel, config: LoraConfig, *, router_index: int, misfed: Mapping[str, str]
) -> Routed:
    """Fit a config to the routed layers of a base, and check it before anything changes.

    "all-linear" (or no target at all) becomes the names of all linears inside these layers that can be adapted exactly.
    A name that modules outside of them have too means those inside.

    Args:
        base: without adapters.
        router_index: the first layer that may carry experts.
        misfed: the linears that are not fed the tokens of a forward, and what they are fed.

    Raises:
        ValueError: with every reason why this config cannot make a routed expert.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"lora is {config!r}, a {type(config).__name__}; experts are made of a peft.LoraConfig")
    config = copy.deepcopy(config)
    linears = find_linears(base, misfed=misfed)
    targets = config.target_modules
    is_all = targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR)
    prefix, layers = decoder_layers(base)
    if is_all:
        if all(index < router_index for index in linears.layers.values()):
            here = in_words(linears.left_out, linears.raw) or listed(_layer_leaves(base))
            raise ValueError(f"all-linear finds nothing to adapt: {ROUTABLE}, and here are {here}")
        inside = {f"{prefix}.{name}" for name, _ in layers.named_modules() if name}
        # The name of what is only below the router could mean a module outside.
        routed = {name for name, index in linears.layers.items() if index >= router_index}
        config.target_modules = shortest_names(routed, inside - linears.layers.keys())
    if router_index > 0 and config.layers_to_transform is None and not isinstance(config.target_modules, str):
        config.layers_to_transform = list(range(router_index, len(layers)))
        config.layers_pattern = prefix.rsplit(".", 1)[-1]
    problems = _unsupported_fields(config)
    spared: set[str] = set()
    try:
        reached = targeted(base, config)
    except (TypeError, re.error) as error:  # none at all, or a pattern that is none
        problems.append(f"target_modules {config.target_modules!r} cannot be read: {error}")
    else:
        spared = _spared(config, reached, linears, prefix)
        reached -= spared
        problems += [*_reach_problems(base, config, reached, linears, router_index), *_unmatched(base, config, linears)]
    if problems:
        raise ValueError("this LoraConfig cannot make a routed expert: " + "; ".join(problems))
    config = naming_exactly(base, config, reached)
    config.task_type = TaskType.CAUSAL_LM
    config.inference_mode = False
    left_out = {name: linears.left_out.get(name, IS_OUTSIDE) for name in sorted(spared)}
    return Routed(config, in_words(linears.left_out, linears.raw) if is_all else in_words(left_out))


def _spared(config: LoraConfig, reached: set[str], linears: Linears, prefix: str) -> set[str]:
    """The modules that a config reaches only because they are called as others, which can be routed."""
    meant = {name.rpartition(".")[2] for name in reached & linears.layers.keys()}
    named = set() if isinstance(config.target_modules, str) else set(config.target_modules or ())
    others = {name for name in reached - named if name in linears.left_out or not name.startswith(f"{prefix}.")}
    return {name for name in others if name.rpartition(".")[2] in meant}


def _unmatched(base: PreTrainedModel, config: LoraConfig, linears: Linears) -> list[str]:
    """Names of linears that no module has, beside others that some have: PEFT passes over them."""
    names = [name for name, _ in base.named_modules()]
    targets = [] if config.target_modules is None or isinstance(config.target_modules, str) else config.target_modules
    missing = [name for name in sorted(targets) if not any(f".{module}".endswith(f".{name}") for module in names)]
    if not missing or len(missing) == len(targets):  # where nothing matches at all, that is a problem of its own
        return []
    known = ", ".join(sorted({name.rpartition(".")[2] for name in linears.layers}))
    return [f"target_modules has {listed(missing)}, which matches nothing; the layers have the linears {known}"]


def lora_problems(
    base: PreTrainedModel, config: LoraConfig, *, router_index: int, misfed: Mapping[str, str]
) -> list[str]:
    """Every reason why an adapter of this config cannot be a routed expert of this base; none: it can.

    Args:
        base: with or without adapters injected.
        router_index: the first layer that may carry experts.
        misfed: the linears that are not fed the tokens of a forward, and what they are fed.
    """
    problems = _unsupported_fields(config)
    try:
        reached = targeted(base, config)
    except (TypeError, re.error) as error:  # none at all, or a pattern that is none
        return [*problems, f"target_modules {config.target_modules!r} cannot be read: {error}"]
    return [*problems, *_reach_problems(base, config, reached, find_linears(base, misfed=misfed), router_index)]


def _reach_problems(
    base: PreTrainedModel, config: LoraConfig, reached: set[str], linears: Linears, router_index: int
) -> list[str]:
    """What is wrong with the modules that a config reaches."""
    problems = []
    prefix, _ = decoder_layers(base)
    others = sorted(reached - linears.layers.keys())
    outside = [name for name in others if not name.startswith(f"{prefix}.")]
    strange = [name for name in others if name not in outside and name not in linears.left_out]
    below = sorted(name for name in reached if linears.layers.get(name, router_index) < router_index)
    if outside:
        problems.append(
            f"target_modules reaches {listed(outside)}: only linears inside the decoder layers can be routed, "
            "not embeddings or the head"
        )
    if strange:
        kinds = [f"{name} ({type(base.get_submodule(name)).__name__})" for name in strange]
        problems.append(f"target_modules reaches {listed(kinds)}, which cannot be routed: {ROUTABLE}")
    left_out = {name: linears.left_out[name] for name in others if name in linears.left_out}
    if left_out:
        problems.append(f"target_modules reaches {in_words(left_out)}; leave it out")
    if below:
        layers = ", ".join(str(index) for index in sorted({linears.layers[name] for name in below}))
        problems.append(
            f"target_modules reaches {listed(below)} below the router (layers {layers}), which reads the hidden states "
            f"entering layer {router_index}: layers before it must stay the base's own"
        )
    if not reached:
        problems.append(f"target_modules {config.target_modules!r} matches nothing in {type(base).__name__}")
    return problems


def _layer_leaves(base: PreTrainedModel) -> list[str]:
    """The innermost modules of the decoder layers, with their classes."""
    prefix, layers = decoder_layers(base)
    leaves = [(name, module) for name, module in layers.named_modules() if not any(module.children())]
    return [f"{prefix}.{name} ({type(module).__name__})" for name, module in leaves]


def _unsupported_fields(config: LoraConfig) -> list[str]:
    problems = []
    if not isinstance(config.r, int) or config.r < 1:
        problems.append(f"r is {config.r!r}; it must be a whole number of at least 1")
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if field.name not in LORA_FIELDS and value != default and value:
            reason = WHY_NOT.get(field.name, "routed experts are plain LoRA")
            problems.append(f"{field.name} is {value!r}: {reason}")
    if config.init_lora_weights not in (True, False, "gaussian"):
        problems.append(
            f"init_lora_weights is {config.init_lora_weights!r}: routed experts start from True, False or "
            "'gaussian', because the others rewrite the base's weights or need a plain LoRA layer"
        )
    return problems


def read_adapter(path: str, **kwargs: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA adapter's config, ready to train on, and its tensors on the CPU.

    Args:
        path: a folder or a hub id.
        kwargs: of the hub: revision, subfolder, token, cache_dir.

    Raises:
        ValueError: where there is none, or one of another kind than LoRA.
    """
    try:
        config = PeftConfig.from_pretrained(path, **kwargs)
        state = load_peft_weights(path, device="cpu", **kwargs) if isinstance(config, LoraConfig) else {}
    except Exception as error:  # PEFT, safetensors, pickle and the hub raise errors of twelve kinds
        raise ValueError(f"adapter {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapter {path} is a {type(config).__name__}; experts are LoRA adapters")
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"adapter {path} holds something else than named tensors")
    config.inference_mode = False
    return config, state


def state_problems(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """What is wrong with the tensors of a file: missing, foreign, misshapen, not finite; none: nothing."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - state.keys())]
    problems += [f"{name} does not belong in it" for name in sorted(state.keys() - expected.keys())]
    for name in sorted(expected.keys() & state.keys()):
        if expected[name].shape != state[name].shape:
            problems.append(f"{name} has shape {list(state[name].shape)}, expected {list(expected[name].shape)}")
        elif not torch.isfinite(state[name].to(expected[name].dtype)).all():
            problems.append(f"{name} holds values that are not finite in {expected[name].dtype}")
    return problems
