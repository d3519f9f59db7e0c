"""One forward's tokens laid out for the experts: which path, which runs, which weights.

Shapes: B batch, S sequence, T = B*S tokens, N assignments (tokens x selected experts), D in, O out,
        R sum of the ranks, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TOKENS_PER_SEGMENT = 24
"""A segment of the sparse path costs about as much to start as this many tokens of one expert's arithmetic."""

EXPERTS_PER_CHOICE = 4
"""Up to so many experts for each selected one, computing all of them costs no more than moving tokens."""

RUNS_PER_EXPERT = 2
"""Up to so many runs for each expert at hand, tokens are multiplied where they lie; more are grouped first."""


class ExpertShape(NamedTuple):
    """One expert as one routed linear holds it."""

    name: str
    rank: int
    scaling: float


class Segment(NamedTuple):
    """A run of consecutive assignments that share an expert; `expert` is None for the base alone."""

    expert: str | None
    length: int


class Dispatch:
    """The tokens of one forward and the experts they go to; made once, read by every routed linear.

    What depends on the routing weights is computed here and not in the layers: a layer that is
    recomputed under gradient checkpointing must record the same operations as the first time.

    Args:
        names: the experts, in gate order.
        weights_TE: routing weights, fp32, zero where an expert is not selected. None: every assignment
            of `segments` has weight exactly 1 and no gradient is wanted.
        layouts: the distinct `expert_shapes` of the model's routed linears.
        dtype: what the layers compute the adapters in.
        segments: None for the dense path, else the runs of the sparse path.
        order: for the sparse path, how assignments are grouped; None where they are the tokens in order.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        weights_TE: Tensor | None,
        layouts: Iterable[tuple[ExpertShape, ...]],
        dtype: torch.dtype,
        segments: Sequence[Segment] | None = None,
        order: Order | None = None,
    ) -> None:
        self.names = tuple(names)
        self.segments = None if segments is None else tuple(segments)
        self.order = order
        self.lengths = [segment.length for segment in segments or ()]
        self.column_weights: dict[tuple[ExpertShape, ...], Tensor] = {}
        """Dense: w_e s_e for each of the R stacked rank columns of a layout, [T, R]."""
        self.segment_weights: tuple[Tensor, ...] | None = None
        """Sparse: the weight of each assignment, one [n, 1] tensor a segment; None where all are 1."""
        if weights_TE is None:
            return
        if segments is None:
            for shapes in layouts:
                self.column_weights[shapes] = self._columns(weights_TE, shapes).to(dtype)
        else:
            self.segment_weights = self._assignments(weights_TE).to(dtype).split(self.lengths)

    def _columns(self, weights_TE: Tensor, shapes: tuple[ExpertShape, ...]) -> Tensor:
        position = {name: index for index, name in enumerate(self.names)}
        index = [position[shape.name] for shape in shapes for _ in range(shape.rank)]
        scaling = [shape.scaling for shape in shapes for _ in range(shape.rank)]
        device = weights_TE.device
        return weights_TE.index_select(1, torch.tensor(index, dtype=torch.int64, device=device)) * torch.tensor(
            scaling, device=device
        )

    def _assignments(self, weights_TE: Tensor) -> Tensor:
        assert self.segments is not None
        position = {name: index for index, name in enumerate(self.names)}
        device = weights_TE.device
        expert = torch.tensor([position.get(name, 0) for name, _ in self.segments], device=device)  # type: ignore[arg-type]
        lengths = torch.tensor(self.lengths, device=device)
        expert_N = expert.repeat_interleave(lengths, output_size=sum(self.lengths))
        weights_NE = weights_TE if self.order is None else self.order.gather(weights_TE)
        return weights_NE.gather(1, expert_N[:, None])


class ForwardContext:
    """What one forward of the model knows about itself; it lives exactly as long as that forward.

    Gradient checkpointing holds on to it and puts it back while it recomputes.

    Args:
        forced: what `route_to` asked for when the forward began, in `RoutingHooks`' terms.
        dense: whether some expert was nascent then; an older Transformers recomputes the routing too.
        attention_mask: [batch, tokens] as the forward was given it.
        position_ids: [batch, seq] likewise; where they start over, another text begins.
        prompt_lengths: int64 [batch] likewise.
        labels: int64 [batch, seq] likewise.
        ends_at_router: nothing is asked for but the routing.
    """

    def __init__(
        self,
        forced: Any,
        *,
        dense: bool = False,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        ends_at_router: bool = False,
    ) -> None:
        self.forced = forced
        self.dense = dense
        self.attention_mask = attention_mask
        self.position_ids = position_ids
        self.prompt_lengths = prompt_lengths
        self.labels = labels
        self.ends_at_router = ends_at_router
        self.last_hidden: Tensor | None = None
        """[batch, seq, hidden] of a pass of the base alone, where the router reads those."""
        self.features: Tensor | None = None
        self.states: Any = None
        """The router's memory after each token."""
        self.routing: Any = None
        self.dispatch: Dispatch | None = None
        self.outer: ForwardContext | None = None


class ContextSlot:
    """The one object that a model and all its routed linears share: whose forward is running."""

    def __init__(self) -> None:
        self.current: ForwardContext | None = None

    def begin(self, context: ForwardContext) -> None:
        """A forward starts."""
        context.outer, self.current = self.current, context

    def end(self) -> ForwardContext:
        """The running forward is over, well or badly; returns its context."""
        context = self.current
        assert context is not None
        self.current = context.outer
        return context

    @contextmanager
    def _restored(self, context: ForwardContext | None) -> Iterator[None]:
        before, self.current = self.current, context
        try:
            yield
        finally:
            self.current = before

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of `torch.utils.checkpoint`: what is recomputed reads its own forward's dispatch."""
        return nullcontext(), self._restored(self.current)

    def dispatch(self) -> Dispatch:
        """The running forward's dispatch.

        Raises:
            RuntimeError: outside a forward of the whole model, or before its router has run.
        """
        if self.current is None or self.current.dispatch is None:
            raise RuntimeError(
                "a routed linear was called outside a forward of its DyLoRAMoE model, so nobody has decided which "
                "experts its tokens use; call the whole model. If this came from gradient checkpointing, switch it "
                "on with model.gradient_checkpointing_enable() of the DyLoRAMoE model, not of the base in it"
            )
        return self.current.dispatch


class Order:
    """A grouping of assignments by expert: which token each one is, and the way back.

    Args:
        rows_N: int64, the token of each assignment; every token occurs `top_k` times.
        top_k: assignments per token.
    """

    def __init__(self, rows_N: Tensor, top_k: int) -> None:
        self.rows_N = rows_N
        self.back_TK = rows_N.argsort(stable=True).view(-1, top_k)

    def gather(self, x_TD: Tensor) -> Tensor:
        """Each assignment's token: [N, D]."""
        return _Gather.apply(x_TD, self.rows_N, self.back_TK)

    def scatter(self, y_NO: Tensor) -> Tensor:
        """The sum of each token's assignments: [T, O]."""
        return _Scatter.apply(y_NO, self.rows_N, self.back_TK)


def _sum_back(y_NO: Tensor, back_TK: Tensor) -> Tensor:
    gathered = y_NO.index_select(0, back_TK.reshape(-1))
    return gathered if back_TK.shape[1] == 1 else gathered.view(*back_TK.shape, -1).sum(1)


class _Gather(torch.autograd.Function):
    """rows -> assignments. Its backward is again a gather, where autograd would add row by row."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_N: Tensor, back_TK: Tensor) -> Tensor:
        ctx.back_TK = back_TK
        return x_TD.index_select(0, rows_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum_back(grads[0], ctx.back_TK), None, None


class _Scatter(torch.autograd.Function):
    """assignments -> summed rows; the transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, y_NO: Tensor, rows_N: Tensor, back_TK: Tensor) -> Tensor:
        ctx.rows_N = rows_N
        return _sum_back(y_NO, back_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.rows_N), None, None


def plan_sparse(*, names: Sequence[str], selected_TK: Tensor, mask_T: Tensor) -> tuple[list[Segment], Order | None]:
    """The runs of a sparse dispatch.

    Args:
        names: the experts, in gate order.
        selected_TK: int64, each token's experts as positions in `names`.
        mask_T: bool, False for padding, which uses no expert.

    Returns:
        The segments, and how assignments are grouped (None where they are the tokens in order). Of tokens without
        values, in a simulated step, each expert gets its equal share.
    """
    top_k = selected_TK.shape[1]
    if isinstance(selected_TK, FakeTensor):
        num = selected_TK.numel()
        ends = [num * (index + 1) // len(names) for index in range(len(names))]
        segments = [Segment(name, end - start) for name, start, end in zip(names, [0, *ends], ends, strict=False)]
        return segments, Order(selected_TK.reshape(-1).argsort(stable=True) // top_k, top_k)
    expert_N = selected_TK.masked_fill(~mask_T[:, None], -1).reshape(-1)
    if top_k == 1:
        runs, lengths = expert_N.unique_consecutive(return_counts=True)
        if len(runs) <= RUNS_PER_EXPERT * len(runs.unique()):
            return _segments(names, runs, lengths), None
    order_N = expert_N.argsort(stable=True)
    runs, lengths = expert_N[order_N].unique_consecutive(return_counts=True)
    return _segments(names, runs, lengths), Order(order_N // top_k, top_k)


def _segments(names: Sequence[str], runs: Tensor, lengths: Tensor) -> list[Segment]:
    return [
        Segment(None if run < 0 else names[run], length)
        for run, length in zip(runs.tolist(), lengths.tolist(), strict=True)
    ]


def dense_is_quicker(*, num_tokens: int, num_experts: int, top_k: int) -> bool:
    """Whether all experts at once beat the selected ones alone, by shapes only.

    Dense wastes (E - K) / K of the adapter arithmetic on every token. Sparse starts two products for each
    expert at hand and moves every token there and back; a single token has nothing to move.
    """
    if top_k >= num_experts:
        return True
    if num_tokens == 1:
        return False
    if num_experts <= EXPERTS_PER_CHOICE * top_k:
        return True
    wasted = num_tokens * (num_experts - top_k) / top_k
    return wasted <= TOKENS_PER_SEGMENT * min(num_experts, num_tokens * top_k)
