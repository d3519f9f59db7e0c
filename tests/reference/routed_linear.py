"""The routed linear as a loop over tokens and experts: slow, plain, and what the fast paths are held to.

Its gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.routing.forward_context import ForwardContext


class Delta(NamedTuple):
    """One expert: y = scaling * up (down x)."""

    down: Tensor
    up: Tensor
    scaling: float


def call(routed, x, dispatch):
    """The output of a routed linear by itself, in a forward with this dispatch."""
    context = ForwardContext()
    context.dispatch, context.num_tokens = dispatch, x.numel() // x.shape[-1]
    routed.context_slot.enter(context)
    try:
        return routed(x)
    finally:
        routed.context_slot.end()


def naive_routed_linear(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    experts: Mapping[str, Delta],
    names: Sequence[str],
    weights: Tensor,
) -> Tensor:
    """y_t = W x_t + b + sum_e w_te s_e B_e (A_e x_t).

    Args:
        x: [batch, seq, in].
        experts: those that this linear has; a name without an entry adds nothing.
        names: columns of `weights`.
        weights: [batch, seq, experts].
    """
    rows = []
    for sequence, sequence_weights in zip(x, weights, strict=True):
        for token, token_weights in zip(sequence, sequence_weights, strict=True):
            y = weight @ token
            if bias is not None:
                y = y + bias
            for name, token_weight in zip(names, token_weights, strict=True):
                if name in experts:
                    down, up, scaling = experts[name]
                    y = y + token_weight * scaling * (up @ (down @ token))
            rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)
