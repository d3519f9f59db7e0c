"""What a base must be, how it is kept frozen, and how it is recognised again."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

SAMPLES_PER_TENSOR = 16
REPACKS = "support_avx512bf16_for_cpu"
"""Of a 4-bit linear of bitsandbytes: whether it may pack its weights anew."""
REPACKED = "packing_format_for_cpu"
"""Of the state of 4-bit weights: whether it did."""

SHARDED = "_fingerprint_before_sharding"
"""Attribute of a base whose weights lie in parts on several devices: what `fingerprint` gave when they were whole."""


def check_base(base: object) -> None:
    """Raises ValueError for what cannot be a base."""
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"base is a {type(base).__name__}; pass a hub id, a folder or a loaded causal language model")
    if base.get_output_embeddings() is None or base.config.is_encoder_decoder:
        raise ValueError(f"{type(base).__name__} is no decoder-only causal language model")
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("base already carries adapters; merge or unload them, then pass the plain model")
    if any(getattr(getattr(p, "quant_state", None), REPACKED, False) for p in base.parameters()):
        raise ValueError(
            "base has 4-bit weights that a forward in eval mode packed anew, and nothing can be trained through those; "
            "load the base again, and make the DyLoRAMoE model before its first forward"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise ValueError("base has gradient checkpointing on; switch it on with the DyLoRAMoE model's own method")


def decoder_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The base's stack of decoder layers and its module name.

    Raises:
        ValueError: when the architecture has none that can be told.
    """
    num_layers = base.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not found:
        raise ValueError(
            f"{type(base).__name__} has no stack of {num_layers} decoder layers, so there is nothing to route; "
            "DyLoRA-MoE takes decoder-only causal language models"
        )
    return min(found, key=lambda item: item[0].count("."))


def base_identity(base: PreTrainedModel) -> tuple[str, str | None]:
    return base.name_or_path or "", getattr(base.config, "_commit_hash", None)


def quantization(base: PreTrainedModel) -> dict[str, Any] | None:
    """How its weights were quantised when it was loaded, as `load_base` takes it; None where they were not, or where
    they lie quantised in the base's own files."""
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return None
    return {name: value for name, value in quantizer.quantization_config.to_dict().items() if name[0] != "_"}


def switch_off_dropout(base: PreTrainedModel) -> None:
    """The base's own dropout, as a module or as the number that attention reads, becomes 0.

    So does what bitsandbytes does to 4-bit weights on some CPUs when a forward is in eval mode: it packs them anew, in
    place, for a product in bf16 that has no backward.
    """
    for module in base.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """How many numbers these stand for; an element of 4-bit weights holds two or more."""
    states = [(parameter, getattr(parameter, "quant_state", None)) for parameter in parameters]
    return sum(parameter.numel() if state is None else state.shape.numel() for parameter, state in states)


def fingerprint(base: PreTrainedModel) -> dict[str, Any]:
    """What a base is recognised by: each tensor's name and shape, and bf16-rounded samples of it.

    The samples (16 per tensor, evenly spaced) are the same for one base in fp32 and in bf16, and differ
    for another fine-tune of it.

    Returns:
        "tensors": {name: shape}, "samples": base64 of int16 bf16 patterns in the order of the names,
        "dtype": of the first tensor, "quantized": whether samples were left out for that.
    """
    if SHARDED in vars(base):  # no process has all of it any more
        return vars(base)[SHARDED]
    tensors = dict(sorted(_base_tensors(base).items()))
    quantized = getattr(base, "hf_quantizer", None) is not None
    patterns = [] if quantized else [_samples(tensor) for tensor in tensors.values()]
    packed = torch.cat(patterns).numpy().tobytes() if patterns else b""
    return {
        "quantized": quantized,
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "samples": base64.b64encode(packed).decode("ascii"),
    }


def _base_tensors(base: PreTrainedModel) -> dict[str, Tensor]:
    """The base's own parameters under their own names, also when adapters are injected; tied ones once."""
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in base.named_parameters()
        if ".lora_" not in name
    }


def _samples(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).round().long()
    return flat[index.to(flat.device)].to(torch.bfloat16).cpu().view(torch.int16)


def compare_base(saved: dict[str, Any], base: PreTrainedModel) -> list[str]:
    """The differences between the base of a checkpoint and this one, neither quantised; empty when it is the same."""
    here = fingerprint(base)
    problems = []
    for name in sorted(saved["tensors"].keys() | here["tensors"].keys()):
        ours, theirs = saved["tensors"].get(name), here["tensors"].get(name)
        if ours is None or theirs is None:
            problems.append(f"{name} is only in {'this base' if ours is None else 'the base it was trained on'}")
        elif ours != theirs:
            problems.append(f"{name} has shape {theirs}, was {ours}")
    if problems:
        return problems
    patterns = [unpack_samples(side) for side in (saved, here)]
    if "float16" in (saved["dtype"], here["dtype"]):
        # fp16 rounds a second time, which may move a bf16 value by one step, and has few bits below 6e-5.
        ours_, theirs_ = (pattern.view(torch.bfloat16).float() for pattern in patterns)
        differs = (ours_ - theirs_).abs() > 2.0**-7 * torch.maximum(ours_.abs(), theirs_.abs()) + 2.0**-24
    else:
        differs = patterns[0] != patterns[1]
    differs = differs.view(-1, SAMPLES_PER_TENSOR).any(1)
    names = list(saved["tensors"])
    return [f"{names[index]} has other values" for index in differs.nonzero().flatten().tolist()]


def unpack_samples(side: dict[str, Any]) -> Tensor:
    """The samples of a fingerprint, int16. Raises ValueError unless there are 16 for each tensor."""
    packed = base64.b64decode(side["samples"], validate=True)
    expected = 0 if side["quantized"] else 2 * SAMPLES_PER_TENSOR * len(side["tensors"])
    if len(packed) != expected or not isinstance(side["dtype"], str):
        raise ValueError(f"the base's fingerprint has {len(packed)} bytes of samples, expected {expected}")
    return torch.frombuffer(bytearray(packed), dtype=torch.int16) if packed else torch.zeros(0, dtype=torch.int16)
