"""Merge experts into the base's own weights: W' = W + s_0 B_0 A_0 + sum_e w_e s_e B_e A_e, for every routed linear.

A mixture that is the same for every token is one matrix, so the result is a plain model of the base's class, exact up
to one rounding of each weight. Hu et al. 2021, arXiv:2106.09685, section 4.1, for one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import SHARED


@torch.no_grad()
def bake(model: DyLoRAMoE, weights: Mapping[str, float], *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Merge a fixed mixture into the base's weights; returns the base. `model` must not be used afterwards.

    Args:
        weights: the weights of some members of the pool; that of `base` adds nothing. A shared expert has weight 1.
        dtype: the dtype of the result; None: each weight keeps its own. The sum is formed in fp32 and rounded once.

    Raises:
        ValueError: for a base whose weights are quantised, because adding to them would round all of them again.
    """
    if getattr(model.base, "hf_quantizer", None) is not None:
        raise ValueError("the base's weights are quantised, so nothing can be added to them; load it in full")
    for layer in model.experts.layers:
        linear = cast(nn.Linear, layer.base_layer)
        change = _change(layer, weights)
        if change is not None:
            whole = linear.weight.float() + change
            linear.weight = nn.Parameter(whole.to(dtype or linear.weight.dtype), requires_grad=False)
    base = cast(PreTrainedModel, model.unload())
    return base if dtype is None else base.to(dtype)  # type: ignore[arg-type]


def _change(layer: Any, weights: Mapping[str, float]) -> Tensor | None:
    """The sum that the mixture adds to one linear's weight, fp32; None where the linear has none of these experts."""
    change, weights = None, {**weights, SHARED: 1.0}
    for name, adapter in layer.adapters.items():
        if name in weights:
            part = weights[name] * adapter.shape.scaling * (adapter.up.weight.float() @ adapter.down.weight.float())
            change = part if change is None else change + part
    return change.t() if change is not None and layer.fan_in_fan_out else change
