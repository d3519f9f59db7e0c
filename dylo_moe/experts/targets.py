"""Which linears of a base carry experts, and how a LoRA config of PEFT names exactly these."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dylo_moe.base.stack import decoder_layers
from dylo_moe.utils.words import listed

try:
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )
except ImportError:  # PEFT before 0.19, which converts nothing
    convert_peft_config_for_transformers = None  # type: ignore[assignment]

try:
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
except ImportError:  # likewise
    convert_peft_adapter_state_dict_for_transformers = None  # type: ignore[assignment]

ROUTABLE = "experts adapt nn.Linear, Conv1D, and bitsandbytes' 4-bit and 8-bit linears"

IS_ROUTER = "is the router of a mixture in the base"
IS_NO_PRODUCT = "is no plain product with its weights"
IS_READ_DIRECTLY = "is read by torch's attention without being called"
IS_REFUSED = "PEFT refuses in this family"
IS_FUSED = "PEFT takes for fused experts by its name"
IS_RENAMED = "PEFT would not find again in an adapter's file, because Transformers renames it in checkpoints"
IS_RAW = "is a raw parameter, no linear"
IS_OUTSIDE = "lies outside the decoder layers"

ROUTER_PARTS = {"gate", "router"}
"""What the router of a mixture is called, or the module that it is in."""

SAME = 1e-2
"""How far a linear's output may be from the product with its weights, relative to the largest entry: less than rounding
to bfloat16 makes it."""


class Linears(NamedTuple):
    """The linears inside the decoder layers of a base."""

    layers: dict[str, int]
    """Those that experts can adapt exactly, by module name, each with the index of its layer."""
    left_out: dict[str, str]
    """The others, and why."""
    raw: tuple[str, ...]
    """Parameters of three dimensions, such as the fused experts of a mixture, which have no linear of their own."""


def find_linears(base: PreTrainedModel, *, misfed: Mapping[str, str]) -> Linears:
    """The linears inside the decoder layers, adapted ones too.

    Args:
        base: with or without adapters injected, with weights or without.
        misfed: the linears that are not fed the tokens of a forward, and what they are fed.
    """
    prefix, layers = decoder_layers(base)
    found: dict[str, int] = {}
    left_out: dict[str, str] = {}
    modules = {f"{prefix}.{name}": module for name, module in layers.named_modules() if name}
    linears = layer_linears(base)
    refused = _refused_by_peft(base, {name.rpartition(".")[2] for name in linears})
    renamed = _renamed_by_peft(base, linears)
    for name, index in linears.items():
        last, module = name.rpartition(".")[2], modules[name]
        if name in misfed:
            left_out[name] = misfed[name]
        elif last in refused:
            left_out[name] = refused[last]
        elif name in renamed:
            left_out[name] = IS_RENAMED
        elif isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            left_out[name] = IS_READ_DIRECTLY
        elif _is_router(name, prefix, modules):
            left_out[name] = IS_ROUTER
        elif not isinstance(module, LoraLayer) and not _is_product(module):
            left_out[name] = IS_NO_PRODUCT
        else:
            found[name] = index
    raw = [f"{name}.{own}" for name, module in modules.items() for own in _experts_of(module)]
    return Linears(found, left_out, tuple(raw))


def layer_linears(base: PreTrainedModel) -> dict[str, int]:
    """All linears inside the decoder layers, adapted ones too, each with the index of its layer."""
    prefix, layers = decoder_layers(base)
    return {
        f"{prefix}.{name}": int(name.partition(".")[0])
        for name, module in layers.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, LoraLayer)) and not is_part_of_adapter(name)
    }


def is_part_of_adapter(name: str) -> bool:
    """Whether a module of that name belongs to an injected adapter."""
    return ".lora_" in name or ".base_layer" in name


def _experts_of(module: nn.Module) -> list[str]:
    """The parameters of a module that hold one matrix for each expert of a mixture."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    shapes = [(name, parameter.shape) for name, parameter in module.named_parameters(recurse=False)]
    return [name for name, shape in shapes if len(shape) == 3 and min(shape) > 1]


def _is_router(name: str, prefix: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a linear is, or is in, a "gate" or "router" beside experts: modules called so, or fused parameters."""
    parts = name.removeprefix(f"{prefix}.").split(".")
    at = next((index for index, part in enumerate(parts) if part in ROUTER_PARTS), 0)
    if at == 0:
        return False
    block = modules[f"{prefix}.{'.'.join(parts[:at])}"]
    return any("expert" in name or _experts_of(module) for name, module in block.named_modules())


def _is_product(linear: nn.Module) -> bool:
    """Whether a linear computes W x + b, which a subclass may not; without weights, whether it returns that shape."""
    kind = type(linear)
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__module__.startswith("bitsandbytes"):
        return True
    weight, bias = cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
    x = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(3, -1)
    try:
        with torch.no_grad():
            found, expected = kind.forward(cast(Any, linear), x), F.linear(x, weight, bias)
    except Exception:  # of any kind: its inputs are others
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return found.is_meta or bool((found - expected).abs().max() <= SAME * expected.abs().max())


def _refused_by_peft(base: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The last parts of names that PEFT does not adapt in a base of this family, and why."""
    reasons = {}
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            LoraModel._check_target_module_compatiblity(cast(Any, None), config, base, name)
        except ValueError:
            reasons[name] = IS_REFUSED
            continue
        if _as_injected(base, config) is None:
            reasons[name] = IS_FUSED
    return reasons


def _renamed_by_peft(base: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The linears whose matrices PEFT's loader would leave out in silence.

    It renames the keys of an adapter as Transformers does those of old checkpoints of the base, and a pattern may match
    names that are new already.
    """
    if convert_peft_adapter_state_dict_for_transformers is None:
        return set()
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    read = convert_peft_adapter_state_dict_for_transformers(
        model=base, peft_config=LoraConfig(), adapter_state_dict={key: torch.zeros(1, 1) for key in keys}
    )
    return {name for key, name in keys.items() if key not in read}


def _as_injected(base: PreTrainedModel, config: LoraConfig) -> LoraConfig | None:
    """A copy of a config as PEFT reads it for this base; None where it would adapt raw parameters."""
    config = copy.deepcopy(config)
    if convert_peft_config_for_transformers is not None:
        try:
            convert_peft_config_for_transformers(config, model=base, conversions=get_model_conversion_mapping(base))
        except ValueError:  # it names some of what is fused, and not the rest
            return None
    return None if config.target_parameters else config


def targeted(base: PreTrainedModel, config: LoraConfig) -> set[str]:
    """The modules of a base that a config names.

    Raises:
        TypeError, re.error: where it names none at all, or with a pattern that is none.
    """
    names = [name for name, _ in base.named_modules() if name and not is_part_of_adapter(name)]
    return {name for name in names if check_target_module_exists(config, name)}


def shortest_names(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names, each cut to its last parts as far as it stays apart from all `others`, without repetitions.

    A number alone says nothing to a reader, and is not what a name is cut to.
    """
    taken = {ending for name in others for ending in _endings(name)}

    def shortest(name: str) -> str:
        return next(ending for ending in _endings(name) if ending not in taken and not ending.isdigit())

    return sorted({shortest(name) for name in wanted})


def _endings(name: str) -> list[str]:
    """ "a.b.c" -> ["c", "b.c", "a.b.c"]."""
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def naming_exactly(base: PreTrainedModel, config: LoraConfig, wanted: set[str]) -> LoraConfig:
    """The config, or one that differs in its names alone, for which PEFT adapts exactly the wanted modules.

    A name that modules outside the decoder layers have too is kept, and what is outside is excluded by a pattern;
    where that is not enough, each module is named by as many parts as tell it from all others.
    """
    prefix, _ = decoder_layers(base)
    elsewhere = rf"(?!{re.escape(prefix)}\.).*"
    within = copy.deepcopy(config)
    within.exclude_modules = "|".join([elsewhere, *_excluded(config)])
    one_by_one = copy.deepcopy(config)
    one_by_one.layers_to_transform = one_by_one.layers_pattern = one_by_one.exclude_modules = None
    others = [name for name, _ in base.named_modules() if name and not is_part_of_adapter(name) and name not in wanted]
    one_by_one.target_modules = shortest_names(wanted, others)
    for candidate in (config, within):
        injected = _as_injected(base, candidate)
        if injected is not None and targeted(base, injected) == wanted:
            return candidate
    return one_by_one


def _excluded(config: LoraConfig) -> list[str]:
    """What a config excludes, as patterns."""
    excluded = config.exclude_modules
    if not excluded:
        return []
    if isinstance(excluded, str):
        return [f"(?:{excluded})"]
    return [rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in sorted(excluded))})"]


def in_words(left_out: dict[str, str], raw: Iterable[str] = ()) -> str | None:
    """What is left out and why, with one name for all layers; None where nothing is."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_out.items():
        short = re.sub(r".*?\.\d+\.", "", name, count=1)
        reasons.setdefault(why, []).append(re.sub(r"(?<=\.)\d+(?=\.)", "*", short))
    kinds = {why: sorted(set(names)) for why, names in reasons.items()}
    fused = sorted({re.sub(r".*?\.\d+\.", "", name, count=1) for name in raw})
    if fused:
        kinds[IS_RAW] = fused
    if not kinds:
        return None
    return "; ".join(f"{listed(names)}, which {why}" for why, names in kinds.items())
