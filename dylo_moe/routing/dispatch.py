"""Arrange the tokens of one forward for the experts: which experts are used, with which products and weights.

Shapes: T = batch x sequence tokens, K top-k, N assignments (tokens x selected experts, padding left out), E members of
        the pool, G experts that are used, R sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.routing.config import SHARED

GROUPING_TOKENS = 96
"""The cost of gathering tokens by expert and adding them back, in tokens of one expert's products."""

GROUP_TOKENS = 8
"""The further cost of each group, in tokens of one expert's products."""


class ExpertShape(NamedTuple):
    """The shape of one expert in one routed linear."""

    name: str
    rank: int
    scaling: float


class Layout:
    """The experts of one or more routed linears that have the same experts in the same shapes.

    A layout is compared by identity: every routed linear looks its own up in every forward, and that must not take
    longer the more experts there are.

    Args:
        shapes: the shapes of the experts, in the gate's order.
        shared: the shape of the shared expert; None where there is none.
    """

    def __init__(self, shapes: Iterable[ExpertShape], shared: ExpertShape | None = None) -> None:
        self.shapes = tuple(shapes)
        self.shared = shared


class Dense(NamedTuple):
    """The dense form: every token is multiplied with every expert and weighted, by two products for all experts."""

    names: tuple[str, ...]
    weights_TR: Tensor | None
    """w_e s_e for each of the stacked rank columns; None: all tokens use the only expert, with weight exactly 1."""
    scaling: float
    """s_e of that only expert."""


class Grouped(NamedTuple):
    """The grouped form: tokens are grouped by expert, and each is multiplied only with the experts it selected."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    """The number of assignments of each expert."""
    ends_G: Tensor
    """The end of each expert's assignments, int32."""
    rows_N: Tensor | None
    """The token of each assignment, int64; None if they are all tokens in order."""
    weights_N1: Tensor | None
    """w_e s_e of each assignment; None: all weights are exactly 1, and the scalings are equal."""
    scaling: float
    """s_e, if all scalings are equal."""
    span: slice | None = None
    """Where the tokens are, if they are of one expert and stand side by side, as the header that ends a prompt does."""


class Dispatch:
    """The experts that the tokens of one forward are sent to. It is made once and read by every routed linear.

    What depends on the routing weights is computed here and not in the layers: a layer that is
    recomputed under gradient checkpointing must record the same operations as the first time.

    Args:
        parts: what the linears of each layout compute of the experts that tokens are routed to; None: nothing.
        dtype: the dtype in which they compute it.
        shared: what those of some layouts compute of the shared expert; of the others, nothing.
    """

    def __init__(
        self,
        parts: dict[Layout, Dense | Grouped | None],
        *,
        dtype: torch.dtype,
        shared: dict[Layout, Dense | Grouped | None] | None = None,
    ) -> None:
        self.parts = parts
        self.dtype = dtype
        self.shared = shared or {}


def dispatch_to_all(
    names: Sequence[str], weights_TE: Tensor, *, layouts: Iterable[Layout], dtype: torch.dtype
) -> Dispatch:
    """Send every token to all experts.

    Args:
        names: the members of the pool, in gate order.
        weights_TE: routing weights, fp32, zero where an expert is not selected.
        layouts: the layouts of the model's routed linears.
        dtype: the dtype in which the adapters are computed.
    """
    position = {name: index for index, name in enumerate(names)}
    return Dispatch(
        {layout: _dense(layout.shapes, weights_TE, position=position, dtype=dtype) for layout in layouts}, dtype=dtype
    )


def dispatch_to_selected(
    names: Sequence[str],
    weights_TE: Tensor | None,
    *,
    selected_TK: Tensor,
    layouts: Iterable[Layout],
    dtype: torch.dtype,
    is_exact: bool = False,
) -> Dispatch:
    """Send each token to its selected experts; others are computed, with weight 0, only if that is cheaper.

    Args:
        names: the members of the pool, in gate order.
        weights_TE: as for `dispatch_to_all`; None: all are exactly 1, no gradient is wanted, and no token may meet an
            expert that it did not select, not even with weight 0.
        selected_TK: int64, each token's experts as positions in `names`; -1 for none, as for padding.
        layouts: the layouts of the model's routed linears.
        dtype: the dtype in which the adapters are computed.
        is_exact: a token without experts meets none, not even with weight 0.
    """
    selection = _Selection(names, selected_TK, is_exact=is_exact)
    parts: dict[Layout, Dense | Grouped | None] = {}
    for layout in layouts:
        shapes = [shape for shape in layout.shapes if selection.count(shape.name)]
        parts[layout] = _part(shapes, weights_TE, selection=selection, dtype=dtype)
    return Dispatch(parts, dtype=dtype)


def add_shared(dispatch: Dispatch, uses_T: Tensor, *, is_exact: bool) -> Dispatch:
    """Send tokens to the shared expert too, where the layouts of a dispatch have one.

    It has a part of its own, before that of the others: all real tokens take it with weight 1, so that none has to be
    gathered, and what a token is routed to is computed as if there were no shared expert.

    Args:
        uses_T: bool, the tokens that use it: not those of the base alone, nor padding that is not forced.
        is_exact: no other token may meet it, not even with weight 0.
    """
    shapes = {layout: layout.shared for layout in dispatch.parts if layout.shared is not None}
    if not shapes:
        return dispatch
    weights_T1, selection = uses_T.float()[:, None], None
    if not torch.compiler.is_compiling():  # which tokens those are is known by values only
        selection = _Selection((SHARED,), uses_T.long()[:, None] - 1)

    def part(shape: ExpertShape) -> Dense | Grouped | None:
        if selection is None:
            return _dense([shape], weights_T1, position={SHARED: 0}, dtype=dispatch.dtype)
        used = [shape] if selection.count(SHARED) else []
        return _part(used, None if is_exact else weights_T1, selection=selection, dtype=dispatch.dtype)

    shared = {layout: part(shape) for layout, shape in shapes.items()}
    return Dispatch(dispatch.parts, dtype=dispatch.dtype, shared=shared)


class _Selection:
    """Which tokens selected which experts."""

    def __init__(self, names: Sequence[str], selected_TK: Tensor, *, is_exact: bool = False) -> None:
        self.num_tokens, self.top_k = selected_TK.shape
        self.leaves_some_out = is_exact and bool((selected_TK < 0).all(-1).any())
        """Whether some tokens have no expert, and must meet none."""
        self.position = {name: index for index, name in enumerate(names)}
        self._expert_N = selected_TK.reshape(-1)
        self._counts = torch.bincount(self._expert_N + 1, minlength=len(names) + 1).tolist()
        self._order_N: Tensor | None = None

    def count(self, name: str) -> int:
        """The number of tokens that selected an expert."""
        return self._counts[self.position[name] + 1]

    def rows(self, names: Sequence[str]) -> Tensor:
        """The tokens that selected these experts, one expert after the other, int64."""
        if self._order_N is None:
            self._order_N = self._expert_N.argsort(stable=True)
        ends = list(accumulate(self._counts))
        spans = [(ends[self.position[name]], ends[self.position[name] + 1]) for name in names]
        if all(end == start for (_, end), (start, _) in pairwise(spans)):
            order_N = self._order_N[spans[0][0] : spans[-1][1]]
        else:
            order_N = torch.cat([self._order_N[start:end] for start, end in spans])
        return order_N if self.top_k == 1 else order_N // self.top_k


def _part(
    shapes: Sequence[ExpertShape], weights_TE: Tensor | None, *, selection: _Selection, dtype: torch.dtype
) -> Dense | Grouped | None:
    if not shapes:
        return None
    if len(shapes) == selection.top_k == 1 and selection.count(shapes[0].name) == selection.num_tokens:
        if weights_TE is None or not weights_TE.requires_grad:
            return Dense((shapes[0].name,), None, shapes[0].scaling)
        return _dense(shapes, weights_TE, position=selection.position, dtype=dtype)
    is_quicker = dense_is_quicker(num_tokens=selection.num_tokens, num_experts=len(shapes), top_k=selection.top_k)
    if weights_TE is not None and not selection.leaves_some_out and is_quicker:
        return _dense(shapes, weights_TE, position=selection.position, dtype=dtype)
    return _grouped(shapes, weights_TE, selection=selection, dtype=dtype)


def _dense(
    shapes: Sequence[ExpertShape], weights_TE: Tensor, *, position: dict[str, int], dtype: torch.dtype
) -> Dense | None:
    if not shapes:
        return None
    index = [position[shape.name] for shape in shapes for _ in range(shape.rank)]
    scaling = [shape.scaling for shape in shapes for _ in range(shape.rank)]
    device = weights_TE.device
    weights_TR = weights_TE.index_select(1, torch.tensor(index, dtype=torch.int64, device=device))
    weights_TR = weights_TR * torch.tensor(scaling, device=device)
    return Dense(tuple(shape.name for shape in shapes), weights_TR.to(dtype), 1.0)


def _grouped(
    shapes: Sequence[ExpertShape], weights_TE: Tensor | None, *, selection: _Selection, dtype: torch.dtype
) -> Grouped:
    names = tuple(shape.name for shape in shapes)
    lengths = tuple(selection.count(name) for name in names)
    rows_N = selection.rows(names)
    device = rows_N.device
    repeats = torch.tensor(lengths, device=device)
    scalings = {shape.scaling for shape in shapes}
    weights_N1 = None
    if len(scalings) > 1:
        scaling_G = torch.tensor([shape.scaling for shape in shapes], device=device)
        weights_N1 = scaling_G.repeat_interleave(repeats, output_size=len(rows_N))[:, None]
    if weights_TE is not None and (selection.top_k > 1 or weights_TE.requires_grad):
        expert_G = torch.tensor([selection.position[name] for name in names], device=device)
        expert_N1 = expert_G.repeat_interleave(repeats, output_size=len(rows_N))[:, None]
        chosen_N1 = weights_TE.index_select(0, rows_N).gather(1, expert_N1)
        weights_N1 = chosen_N1 * (shapes[0].scaling if weights_N1 is None else weights_N1)
    in_order = len(rows_N) == selection.num_tokens and torch.equal(rows_N, torch.arange(len(rows_N), device=device))
    return Grouped(
        names,
        lengths,
        repeats.cumsum(0).to(torch.int32),
        None if in_order else rows_N,
        None if weights_N1 is None else weights_N1.to(dtype),
        shapes[0].scaling,
        _span(rows_N) if len(names) == selection.top_k == 1 else None,
    )


def _span(rows_N: Tensor) -> slice | None:
    """The range that ascending rows fill; None where some are missing in it."""
    first, last = rows_N[[0, -1]].tolist()
    return slice(first, last + 1) if last - first + 1 == len(rows_N) else None


def dense_is_quicker(*, num_tokens: int, num_experts: int, top_k: int) -> bool:
    """Whether products with all used experts take less time than those with the selected ones, judged by shapes alone.

    The dense form wastes (G - K) / K of the adapter arithmetic on every token; the grouped form moves tokens, and
    starts a product for each group. The constants are fitted by benchmarks/speed/dispatch.py; docs/performance.md says
    how well they fit.
    """
    wasted = num_tokens * (num_experts - top_k)
    return wasted <= GROUPING_TOKENS + GROUP_TOKENS * num_experts
