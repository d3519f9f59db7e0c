"""Weights of a model that hold NaN or infinity, named in words."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe.experts.expert import ExpertPool
from dylo_moe.routing.router import Router, Routing
from dylo_moe.utils.words import listed


def broken_weights(pool: ExpertPool, router: Router) -> list[str]:
    """The parts that hold NaN or infinity, in words: adapters, gate rows, the scale of the features."""
    broken = [f"the weights of expert {name!r} ({parameter})" for name, parameter in pool.non_finite()]
    broken += [f"the gate row of expert {name!r}" for name in router.non_finite()]
    buffers = ("feature_mean", "feature_scale", "shares")
    return broken + [f"the router's {name}" for name in buffers if not getattr(router, name).isfinite().all()]


def blame_nan(
    routing: Routing, lost: Tensor, *, mask: Tensor, base: PreTrainedModel, pool: ExpertPool, router: Router
) -> None:
    """Name the weights that made an output NaN. Without broken weights, and on padding alone, NaN may be right.

    While a graph is compiled nothing is checked.

    Args:
        routing: the routing of the forward that gave the output.
        lost: bool [batch, seq], true where the output is NaN.
        mask: bool [batch, seq], False on padding; tokens that the base reads alone are not routed, and count.

    Raises:
        ValueError: naming the weights to blame.
    """
    if torch.compiler.is_compiling():
        return
    if lost.shape == mask.shape:
        lost = lost & mask
    misled = routing.mask.new_zeros(())
    if routing.logits is not None:  # top-1 weights are exactly 1, also where the gate is NaN
        misled = (~routing.logits.isfinite().all(-1) & routing.mask).any()
    if not (lost.any() | misled):
        return
    broken = broken_weights(pool, router)
    if not broken:
        own = ((name, weight) for name, weight in base.named_parameters() if ".lora_" not in name)
        broken = [f"the base's {name.replace('.base_layer', '')}" for name, p in own if not p.isfinite().all()]
    if broken:
        raise ValueError(
            f"the output is NaN because of {listed(broken)}; remove the expert, or load an older checkpoint"
        )
