"""The base's identity: a fingerprint of its weights, kept in every checkpoint and compared when one is loaded."""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

SAMPLES_PER_TENSOR = 16

SHARDED = "_fingerprint_before_sharding"
"""The attribute of a sharded base that holds what `fingerprint` returned before it was sharded."""


def base_identity(base: PreTrainedModel) -> tuple[str, str | None]:
    return base.name_or_path or "", getattr(base.config, "_commit_hash", None)


def fingerprint(base: PreTrainedModel) -> dict[str, Any]:
    """The identity of a base: each tensor's name and shape, and bf16-rounded samples of it.

    The samples (16 per tensor, evenly spaced) are the same for one base in fp32 and in bf16, and differ
    for another fine-tune of it.

    Returns:
        "tensors": {name: shape}, "samples": base64 of int16 bf16 patterns in the order of the names,
        "dtype": of the first tensor, "quantized": whether samples were left out for that.
    """
    if SHARDED in vars(base):  # no process has all of it any more
        return vars(base)[SHARDED]
    return fingerprint_of(_base_tensors(base), quantized=getattr(base, "hf_quantizer", None) is not None)


def fingerprint_of(tensors: dict[str, Tensor], *, quantized: bool = False) -> dict[str, Any]:
    """What `fingerprint` returns, of these tensors.

    Args:
        quantized: whether they have no values to sample.
    """
    tensors = dict(sorted(tensors.items()))
    patterns = [] if quantized else [_samples(tensor) for tensor in tensors.values()]
    packed = torch.cat(patterns).numpy().tobytes() if patterns else b""
    return {
        "quantized": quantized,
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "samples": base64.b64encode(packed).decode("ascii"),
    }


def _base_tensors(base: PreTrainedModel) -> dict[str, Tensor]:
    """The base's own parameters by their own names, even if adapters are injected; tied ones occur once."""
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
    return differences(saved, fingerprint(base))


def differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The differences between two fingerprints, of quantised weights in their shapes alone; empty when they are of one
    base."""
    problems = []
    for name in sorted(saved["tensors"].keys() | here["tensors"].keys()):
        ours, theirs = saved["tensors"].get(name), here["tensors"].get(name)
        if ours is None or theirs is None:
            problems.append(f"{name} is only in {'this base' if ours is None else 'the base it was trained on'}")
        elif ours != theirs:
            problems.append(f"{name} has shape {theirs}, was {ours}")
    if problems or saved["quantized"] or here["quantized"]:
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


def some_of(differences: list[str], *, most: int = 5) -> str:
    """The first few differences, and how many more there are."""
    more = f"; and {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(differences[:most]) + more


def resized_embeddings(saved: dict[str, Any], base: PreTrainedModel) -> tuple[int, int] | None:
    """How many rows the token embeddings of a fingerprint have, and those of this base; None where they are equal, or
    differ in more than that."""
    own = base.get_input_embeddings().weight
    for name, parameter in base.named_parameters():
        was, here = saved["tensors"].get(name), list(parameter.shape)
        if parameter is own and was is not None and was != here and was[1:] == here[1:]:
            return was[0], here[0]
    return None


def unpack_samples(side: dict[str, Any]) -> Tensor:
    """The samples of a fingerprint, int16. Raises ValueError unless there are 16 for each tensor."""
    packed = base64.b64decode(side["samples"], validate=True)
    expected = 0 if side["quantized"] else 2 * SAMPLES_PER_TENSOR * len(side["tensors"])
    if len(packed) != expected or not isinstance(side["dtype"], str):
        raise ValueError(f"the base's fingerprint has {len(packed)} bytes of samples, expected {expected}")
    return torch.frombuffer(bytearray(packed), dtype=torch.int16) if packed else torch.zeros(0, dtype=torch.int16)
