"""Keep the matrices of a routed linear's experts contiguous in memory, so that products over all need no copy.

Shapes: D in, O out, r rank of one expert, R sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

MOVED_EXPERTS = 16
"""The most experts whose matrices move to a new block when an expert is added. Moving more would make growth more
expensive the larger the pool is, and so large a pool is hardly ever computed densely."""


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Stack matrices of one width: [r_e, W] each -> [R, W].

    If `pack` made them contiguous, the result is a view without a copy, and no gradient flows through it. Otherwise (if
    they are sharded, moved one by one, not neighbours, or being compiled) it is `torch.cat`, so that correctness never
    depends on the layout.
    """
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if torch.compiler.is_compiling() or not _adjacent(matrices):
        return torch.cat(list(matrices))
    length = sum(matrix.shape[0] for matrix in matrices)
    return first.detach().as_strided((length, first.shape[1]), first.stride())


def _adjacent(matrices: Sequence[Tensor]) -> bool:
    """Whether the matrices follow one another, row by row, as one block of the first one's storage."""
    first = matrices[0]
    if type(first) not in (Tensor, nn.Parameter):
        return False
    stride = (first.shape[1], 1)
    start = expected = first.data_ptr()
    for matrix in matrices:
        if matrix.data_ptr() != expected or matrix.stride() != stride or matrix.dtype != first.dtype:
            return False
        expected += matrix.nbytes
    storage = first.untyped_storage()
    return expected <= storage.data_ptr() + storage.nbytes() and start >= storage.data_ptr()


@torch.no_grad()
def pack(layer: Any) -> list[str]:
    """Make the matrices of all experts of one `RoutedLayer` views of one contiguous block of memory.

    The rows of A and the columns of B are contiguous: both products of the dense path then need no copy, and an expert
    needs no more memory than its own matrices. Values, names and identities of the parameters stay as they are. Those
    that are still on the meta device get their memory here, in the dtype of the others, or in their own if all are.
    If more than `MOVED_EXPERTS` experts have memory already, they stay, and new experts get a block of their own.

    Returns:
        The experts that were on the meta device, whose values the caller must still set.
    """
    fresh = [name for name, adapter in layer.adapters.items() if adapter.down.weight.is_meta]
    for transposed in (False, True):
        modules = [adapter.up if transposed else adapter.down for adapter in layer.adapters.values()]
        weights = [module.weight for module in modules]
        real = [weight for weight in weights if not weight.is_meta]
        if not weights or any(type(weight) is not nn.Parameter for weight in weights):
            continue
        if len({(weight.dtype, weight.device) for weight in real}) > 1:
            continue
        if fresh and len(real) > MOVED_EXPERTS:
            modules = [module for module in modules if module.weight.is_meta]
            weights = [module.weight for module in modules]
        dtype = (real or weights)[0].dtype
        device = real[0].device if real else cast(Tensor, layer.base_layer.weight).device
        whole = sum(weight.numel() for weight in weights) * dtype.itemsize
        rows = [weight.t() if transposed else weight for weight in weights]
        if not fresh and _adjacent(rows) and weights[0].untyped_storage().nbytes() == whole:
            continue
        block_RD = torch.empty(sum(row.shape[0] for row in rows), rows[0].shape[1], dtype=dtype, device=device)
        for module, row, part in zip(modules, rows, block_RD.split([row.shape[0] for row in rows]), strict=True):
            view = part.t() if transposed else part
            if row.is_meta:
                module.weight = nn.Parameter(view, requires_grad=module.weight.requires_grad)
            else:
                part.copy_(row)
                module.weight.data = view
    return fresh
