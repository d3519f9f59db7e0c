"""One routed linear: y = W x + sum_e w_e s_e B_e A_e x, dense or sparse.

Shapes: T tokens of all rows, N assignments (tokens x selected experts), D in, O out, r rank of one expert,
        R sum of the ranks.

A routed linear is PEFT's own LoRA layer with another forward. How the tokens of a forward are sent to
experts is worked out once, in a `Dispatch`; every routed linear of that forward reads the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .dispatch import ContextSlot, Dispatch, ExpertShape


class Adapter(NamedTuple):
    """One expert in one routed linear. The modules are PEFT's; their weights are read at each call."""

    shape: ExpertShape
    down: nn.Linear
    """A, [r, D]."""
    up: nn.Linear
    """B, [O, r]."""


class RoutedLayer:
    """Mixin placed before a PEFT LoRA class: its forward mixes all experts by the routing at hand.

    Disabled or merged it is PEFT, unchanged. LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3. We differ
    in one thing: the experts of a layer share one dropout mask.
    """

    context_slot: ContextSlot
    adapters: dict[str, Adapter]
    """The experts of this layer, in gate order."""
    expert_shapes: tuple[ExpertShape, ...]
    expert_dropout: float
    base_layer: nn.Module
    merged_adapters: list[str]
    training: bool

    def bind(self, context_slot: ContextSlot, names: Iterable[str]) -> None:
        """Take up those of the pool's experts that this layer has.

        Raises:
            ValueError: when they differ in dropout.
        """
        self.context_slot = context_slot
        down, up, dropout = self.lora_A, self.lora_B, self.lora_dropout  # type: ignore[attr-defined]
        names = [name for name in names if name in down]
        ranks, scaling = self.r, self.scaling  # type: ignore[attr-defined]
        shapes = [ExpertShape(name, ranks[name], scaling[name]) for name in names]
        self.adapters = {shape.name: Adapter(shape, down[shape.name], up[shape.name]) for shape in shapes}
        self.expert_shapes = tuple(shapes)
        probabilities = {name: getattr(dropout[name], "p", 0.0) for name in names}
        if len(set(probabilities.values())) > 1:
            raise ValueError(
                f"experts of one layer share a dropout mask, but lora_dropout differs: {probabilities}; "
                "give all the same"
            )
        self.expert_dropout = next(iter(probabilities.values()), 0.0)
        for name in names[1:]:  # one module for all: less memory for each expert
            if dropout[name] is not dropout[names[0]]:
                dropout[name] = dropout[names[0]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., D] -> [..., O], in the dtype of the base's linear."""
        if self.disable_adapters or self.merged:  # type: ignore[attr-defined]
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        result = self.base_layer(x, *args, **kwargs)
        dispatch = self.context_slot.dispatch()
        if not self.adapters:
            return result
        x_TD = x.reshape(-1, x.shape[-1])
        dtype = self.adapters[self.expert_shapes[0].name].down.weight.dtype
        if x_TD.dtype != dtype:
            x_TD = self._cast_input_dtype(x_TD, dtype)  # type: ignore[attr-defined]
        if self.training and self.expert_dropout > 0:
            x_TD = F.dropout(x_TD, self.expert_dropout)
        result_TO = result.reshape(-1, result.shape[-1])
        if dispatch.segments is None:
            weights_TR = dispatch.column_weights[self.expert_shapes]
            mixed_TO = mix_dense(x_TD, result_TO, adapters=self.adapters, weights_TR=weights_TR)
        else:
            mixed_TO = mix_sparse(x_TD, result_TO, adapters=self.adapters, dispatch=dispatch)
        return mixed_TO.view_as(result)


class RoutedLinear(RoutedLayer, lora.Linear):
    """PEFT's LoRA around `nn.Linear` (or Conv1D), routed."""


ROUTED_CLASSES: dict[type, type] = {lora.Linear: RoutedLinear}
"""The routed class of each PEFT layer class. At module level, so that models pickle."""


def mix_dense(x_TD: Tensor, result_TO: Tensor, *, adapters: dict[str, Adapter], weights_TR: Tensor) -> Tensor:
    """result + ((x A^T) * weights) B over all experts at once: two products for any number of experts.

    Args:
        weights_TR: w_e s_e for each of the stacked rank columns.
    """
    a_RD = stacked([adapter.down.weight for adapter in adapters.values()])
    b_RO = stacked([adapter.up.weight for adapter in adapters.values()], transposed=True)
    return _add_product(result_TO, F.linear(x_TD, a_RD) * weights_TR, b_RO, scaling=1.0)


def mix_sparse(x_TD: Tensor, result_TO: Tensor, *, adapters: dict[str, Adapter], dispatch: Dispatch) -> Tensor:
    """result + w_e s_e B_e A_e x for the selected experts of each token, and no other arithmetic."""
    segments, lengths, order = dispatch.segments, dispatch.lengths, dispatch.order
    assert segments is not None
    if order is None:
        bases = _split(result_TO, lengths)
    else:
        x_TD, bases = order.gather(x_TD), None
    parts = []
    for index, (segment, x_nD) in enumerate(zip(segments, _split(x_TD, lengths), strict=True)):
        adapter = adapters.get(segment.expert)  # type: ignore[arg-type]
        if adapter is None:
            parts.append(x_nD.new_zeros(segment.length, result_TO.shape[1]) if bases is None else bases[index])
            continue
        hidden_nr = F.linear(x_nD, adapter.down.weight)
        if dispatch.segment_weights is not None:
            hidden_nr = hidden_nr * dispatch.segment_weights[index]
        b_rO, scaling = adapter.up.weight.t(), adapter.shape.scaling
        if bases is None:
            parts.append((hidden_nr * scaling) @ b_rO)
        else:
            parts.append(_add_product(bases[index], hidden_nr, b_rO, scaling=scaling))
    if order is not None:
        return (result_TO + order.scatter(torch.cat(parts))).to(result_TO.dtype)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if torch.is_grad_enabled() else result_TO


def _split(tensor_ND: Tensor, lengths: list[int]) -> Sequence[Tensor]:
    return (tensor_ND,) if len(lengths) == 1 else tensor_ND.split(lengths)


def _add_product(result_NO: Tensor, hidden_NR: Tensor, b_RO: Tensor, *, scaling: float) -> Tensor:
    """result + scaling * hidden b, in the dtype of `result`.

    Where no gradient is recorded it is added into `result`, the fresh output of a frozen linear.
    """
    in_place = not torch.is_grad_enabled()
    if result_NO.dtype == hidden_NR.dtype == b_RO.dtype:
        add = result_NO.addmm_ if in_place else result_NO.addmm
        return add(hidden_NR, b_RO, alpha=scaling)
    total_NO = result_NO + (hidden_NR * scaling) @ b_RO
    return result_NO.copy_(total_NO) if in_place else total_NO.to(result_NO.dtype)


class _StackedView(torch.autograd.Function):
    """The concatenation of parameters that already lie behind one another, without copying a byte."""

    @staticmethod
    def forward(ctx: Any, transposed: bool, *weights: Tensor) -> Tensor:
        ctx.transposed = transposed
        ctx.lengths = [weight.shape[1 if transposed else 0] for weight in weights]
        return _view(weights, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pieces = [piece.t() if ctx.transposed else piece for piece in grads[0].split(ctx.lengths)]
        wanted = ctx.needs_input_grad[1:]
        return None, *(piece if want else None for piece, want in zip(pieces, wanted, strict=True))


def stacked(weights: Sequence[Tensor], *, transposed: bool = False) -> Tensor:
    """The matrices of a layer's experts as one: A's [r_e, D] as [R, D], or, `transposed`, B's [O, r_e] as [R, O].

    Free of copies when `pack` has laid them behind one another; otherwise (sharded, moved one by one,
    or being compiled) `torch.cat`, so that correctness never rests on the layout.
    """
    if len(weights) == 1:
        return weights[0].t() if transposed else weights[0]
    if torch.compiler.is_compiling() or not _adjacent(weights, transposed):
        return torch.cat([weight.t() if transposed else weight for weight in weights])
    if torch.is_grad_enabled():
        return _StackedView.apply(transposed, *weights)
    return _view(weights, transposed)


def _view(weights: Sequence[Tensor], transposed: bool) -> Tensor:
    first = weights[0].detach()
    width = first.shape[0 if transposed else 1]
    length = sum(weight.shape[1 if transposed else 0] for weight in weights)
    return first.as_strided((length, width), (width, 1))


def _adjacent(weights: Sequence[Tensor], transposed: bool) -> bool:
    """Whether the matrices, `transposed` ones by their columns, are one block of the first one's storage."""
    first = weights[0]
    if isinstance(first, FakeTensor):  # of a simulated step: no address, but the storage that `pack` gave
        return len({weight.untyped_storage()._cdata for weight in weights}) == 1
    if type(first) not in (Tensor, nn.Parameter):
        return False
    strides = (1, first.shape[0]) if transposed else (first.shape[1], 1)
    start = expected = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != expected or weight.stride() != strides or weight.dtype != first.dtype:
            return False
        expected += weight.nbytes
    storage = first.untyped_storage()
    return expected <= storage.data_ptr() + storage.nbytes() and start >= storage.data_ptr()


MOVED_EXPERTS = 16
"""Up to so many experts move together when one more comes. Moving more would make growth dearer the larger the pool is,
and so large a pool is hardly ever computed densely."""


@torch.no_grad()
def pack(layer: RoutedLayer) -> list[str]:
    """Lay the experts of one routed linear behind one another in memory, each matrix a view of one block.

    A's rows and B's columns: both products of the dense path then need no copy, and an expert costs no
    more memory than its own matrices. Values, names and identities of the parameters stay as they are; those
    still on the meta device get their memory here: in the dtype of the others, or where there are none in their own.
    Where more than `MOVED_EXPERTS` have theirs, those that come get blocks of their own.

    Returns:
        The experts that were on the meta device: their values are still to be set.
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
        if not fresh and _adjacent(weights, transposed) and weights[0].untyped_storage().nbytes() == whole:
            continue
        rows = [weight.t() if transposed else weight for weight in weights]
        block_RD = torch.empty(sum(row.shape[0] for row in rows), rows[0].shape[1], dtype=dtype, device=device)
        for module, row, part in zip(modules, rows, block_RD.split([row.shape[0] for row in rows]), strict=True):
            view = part.t() if transposed else part
            if row.is_meta:
                module.weight = nn.Parameter(view, requires_grad=module.weight.requires_grad)
            else:
                part.copy_(row)
                module.weight.data = view
    return fresh


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """What the products with this adapter matrix are computed in: its own dtype, or autocast's."""
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
