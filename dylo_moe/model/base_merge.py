"""An expert that is merged into the frozen base for a while: one at a time, and the base comes back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def check_unmerged(base: nn.Module, what: str) -> None:
    """Refuse what needs the base as it is.

    Args:
        what: what was asked for, in the message.

    Raises:
        ValueError: while an expert is merged into the base.
    """
    for module in base.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            name = next(iter(module.merged_adapters), "an expert")
            raise ValueError(f"cannot {what}: {name!r} is merged into the base; unmerge_adapter() first")


@torch.no_grad()
def merge_and_keep(tuner: Any, layers: Sequence[Any], names: list[str], **options: Any) -> list[tuple[Any, Tensor]]:
    """Merge adapters into the base's weights; returns what the weights were, for `put_back`.

    Subtracting what was added rounds a second time, so that the base would be another one than before. Weights of
    fewer bits are not kept, because a merge exchanges them for new ones; they come back rounded.

    Args:
        tuner: PEFT's model.
        layers: the linears that carry adapters.
        options: as PEFT's `merge_adapter` takes them.
    """
    adapted = [layer for layer in layers if any(name in layer.lora_A for name in names)]
    kept = [
        (layer, layer.base_layer.weight.detach().to("cpu", copy=True))
        for layer in adapted
        if layer.base_layer.weight.is_floating_point()
    ]
    try:
        tuner.merge_adapter(names, **options)
    except BaseException:
        for layer in adapted:
            layer.merged_adapters.clear()
        _write(kept)
        raise
    return kept


@torch.no_grad()
def put_back(tuner: Any, kept: list[tuple[Any, Tensor]]) -> None:
    """Unmerge what was merged, and give the weights the bits that they had."""
    tuner.unmerge_adapter()
    _write(kept)
    kept.clear()


def _write(kept: list[tuple[Any, Tensor]]) -> None:
    for layer, weight in kept:
        layer.base_layer.weight.data.copy_(weight)
