"""The requirements on a base, and how it is kept frozen."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from dylo_moe.base.stack import decoder_layers
from dylo_moe.utils.undo import all_or_nothing
from dylo_moe.utils.words import listed

REPACKS = "support_avx512bf16_for_cpu"
"""An attribute of bitsandbytes' 4-bit linears: whether a forward may repack the weights."""

REPACKED = "packing_format_for_cpu"
"""An attribute of the state of 4-bit weights, which is there once they were repacked."""


def check_base(base: object) -> None:
    """Raise ValueError for a model that cannot be a base."""
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"base is a {type(base).__name__}; pass a hub id, a folder or a loaded causal language model")
    if base.get_output_embeddings() is None or base.config.is_encoder_decoder:
        raise ValueError(f"{type(base).__name__} is no decoder-only causal language model")
    absent = [name for name, tensor in (*base.named_parameters(), *base.named_buffers()) if tensor.is_meta]
    if absent and hasattr(base, "hf_device_map"):
        raise ValueError(
            f"base has weights that device_map left beside the device or on disk ({listed(absent)}), and no expert can "
            "be trained beside those; load all of it onto the device: a smaller base, a smaller dtype, or 4 bits"
        )
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("base already carries adapters; merge or unload them, then pass the plain model")
    if any(getattr(getattr(p, "quant_state", None), REPACKED, False) for p in base.parameters()):
        raise ValueError(
            "base has 4-bit weights that a forward in eval mode repacked, and nothing can be trained through those; "
            "load the base again, and make the DyLoRAMoE model before its first forward"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise ValueError("base has gradient checkpointing on; switch it on with the DyLoRAMoE model's own method")
    decoder_layers(base)  # finds them once, by running the base where that is needed


def untouched_on_failure(base: PreTrainedModel) -> AbstractContextManager[None]:
    """Leave a base as it was, its configs too, if what is done to it in the `with` block raises."""
    return all_or_nothing([*base.modules(), *_configs(base)])


def _configs(base: PreTrainedModel) -> list[Any]:
    """The configs that a base's modules hold, and those inside them."""
    found: dict[int, Any] = {}
    waiting = [value for module in base.modules() for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (PreTrainedConfig, GenerationConfig)) and id(value) not in found:
            found[id(value)] = value
            waiting += vars(value).values()
    return list(found.values())


def quantization(base: PreTrainedModel) -> dict[str, Any] | None:
    """The `quantization_config` with which the base's weights were quantised on loading.

    None if they were not quantised, or are stored quantised in the base's own files.
    """
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return None
    return {name: value for name, value in quantizer.quantization_config.to_dict().items() if name[0] != "_"}


def switch_off_dropout(base: PreTrainedModel) -> None:
    """Set the base's own dropout to 0: where it is a module, an attribute, or a number that layers read of a config.

    On some CPUs a forward in eval mode makes bitsandbytes repack 4-bit weights in place, for a bf16 product that has no
    backward; this is switched off too.
    """
    for module in base.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_dropout(name, value):
                setattr(module, name, 0.0)
            elif isinstance(value, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
                setattr(module, name, WithoutDropout(value))  # models keep the config itself, which is saved with them


def _is_dropout(name: str, value: Any) -> bool:
    return isinstance(value, float) and value != 0 and "drop" in name


class WithoutDropout:
    """A view of a model's config in which every dropout is 0; all else is the config's own.

    Args:
        config: of the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.__dict__["_config"] = config

    def __getattr__(self, name: str) -> Any:
        if "_config" not in vars(self):  # while it is being copied
            raise AttributeError(name)
        value = getattr(self._config, name)
        return 0.0 if _is_dropout(name, value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def keep_in_eval(module: nn.Module) -> None:
    """Leave in training mode only what needs it: what switches gradient checkpointing on by it, and adapted linears.

    All else of a base is frozen, and must not draw random numbers: the jitter of routers, dropout with fixed numbers.

    Args:
        module: the base, in training mode; it and its parts that are models stay in it.
    """
    for child in module.children():
        if isinstance(child, BaseTunerLayer) or type(child).__module__.startswith("bitsandbytes"):
            continue
        if not (isinstance(child, PreTrainedModel) or hasattr(child, "gradient_checkpointing")):
            child.training = False
        keep_in_eval(child)


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """The number of values that parameters hold; an element of 4-bit weights holds two or more."""
    states = [(parameter, getattr(parameter, "quant_state", None)) for parameter in parameters]
    return sum(parameter.numel() if state is None else state.shape.numel() for parameter, state in states)
