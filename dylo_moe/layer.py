"""One routed linear: y = W x + sum_e w_e s_e B_e A_e x, dense or sparse.

Shapes: B batch, S sequence, T = B*S tokens, N assignments (tokens x selected experts), D in, O out,
        r rank of one expert, R sum of the ranks, E experts, K top-k.

A routed linear is PEFT's own LoRA layer with another forward. How the tokens of a forward are sent to
experts is worked out once, in a `Dispatch`; every routed linear of that forward reads the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

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
        expert_N = expert.repeat_interleave(torch.tensor(self.lengths, device=device))
        weights_NE = weights_TE if self.order is None else self.order.gather(weights_TE)
        return weights_NE.gather(1, expert_N[:, None])


class ForwardContext:
    """What one forward of the model knows about itself; it lives exactly as long as that forward.

    Gradient checkpointing holds on to it and puts it back while it recomputes.
    """

    def __init__(self, attention_mask: Tensor | None) -> None:
        self.attention_mask = attention_mask
        self.routing: Any = None
        self.dispatch: Dispatch | None = None
        self.outer: ForwardContext | None = None


class ContextSlot:
    """The one object that a model and all its routed linears share: whose forward is running."""

    def __init__(self) -> None:
        self.current: ForwardContext | None = None
        self.stop_at_router: dict[str, Any] | None = None
        """Where to leave the routing of a forward that is to end there."""
        self.generating = False
        """Inside `generate`, which may repeat rows."""

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
        mix = mix_dense if dispatch.segments is None else mix_sparse
        result_TO = result.reshape(-1, result.shape[-1])
        return mix(x_TD, result_TO, adapters=self.adapters, dispatch=dispatch).view_as(result)


class RoutedLinear(RoutedLayer, lora.Linear):
    """PEFT's LoRA around `nn.Linear` (or Conv1D), routed."""


ROUTED_CLASSES: dict[type, type] = {lora.Linear: RoutedLinear}
"""The routed class of each PEFT layer class. At module level, so that models pickle."""


def mix_dense(x_TD: Tensor, result_TO: Tensor, *, adapters: dict[str, Adapter], dispatch: Dispatch) -> Tensor:
    """result + ((x A^T) * weights) B over all experts at once: two products for any number of experts."""
    a_RD = stacked([adapter.down.weight for adapter in adapters.values()])
    b_RO = stacked([adapter.up.weight.t() for adapter in adapters.values()])
    shapes = tuple(adapter.shape for adapter in adapters.values())
    hidden_TR = F.linear(x_TD, a_RD) * dispatch.column_weights[shapes]
    return _add_product(result_TO, hidden_TR, b_RO, scaling=1.0)


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


class _StackedView(torch.autograd.Function):
    """The concatenation of parameters that already lie behind one another, without copying a byte."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.lengths = [part.shape[0] for part in parts]
        first = parts[0].detach()
        return first.as_strided((sum(ctx.lengths), first.shape[1]), (first.shape[1], 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pieces = grads[0].split(ctx.lengths)
        return tuple(piece if wanted else None for piece, wanted in zip(pieces, ctx.needs_input_grad, strict=True))


def stacked(parts: list[Tensor]) -> Tensor:
    """The [r_e, D] matrices of a layer's experts as one [R, D] matrix.

    Free of copies when `pack` has laid them behind one another; otherwise (sharded, moved one by one,
    or being compiled) `torch.cat`, so that correctness never rests on the layout.
    """
    if len(parts) == 1:
        return parts[0]
    if torch.compiler.is_compiling() or not _adjacent(parts):
        return torch.cat(parts)
    return _StackedView.apply(*parts)


def _adjacent(parts: list[Tensor]) -> bool:
    if type(parts[0]) not in (Tensor, nn.Parameter):
        return False
    storage = parts[0].untyped_storage().data_ptr()
    expected = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != expected or not part.is_contiguous():
            return False
        if part.untyped_storage().data_ptr() != storage:
            return False
        expected += part.numel() * part.element_size()
    return True


@torch.no_grad()
def pack(layer: RoutedLayer) -> None:
    """Lay the experts of one routed linear behind one another in memory, each matrix a view of one block.

    A's rows and B's columns: both products of the dense path then need no copy, and an expert costs no
    more memory than its own matrices. Values, names and identities of the parameters stay as they are.
    """
    for transposed in (False, True):
        weights = [adapter.up.weight if transposed else adapter.down.weight for adapter in layer.adapters.values()]
        if not weights or any(type(weight) is not nn.Parameter for weight in weights):
            continue
        if len({(weight.dtype, weight.device) for weight in weights}) > 1:
            continue
        rows = [weight.t() if transposed else weight for weight in weights]
        whole = sum(row.numel() * row.element_size() for row in rows)
        if weights[0].is_meta or (_adjacent(rows) and rows[0].untyped_storage().nbytes() == whole):
            continue
        block_RD = torch.cat(rows)
        for weight, part in zip(weights, block_RD.split([row.shape[0] for row in rows]), strict=True):
            weight.data = part.t() if transposed else part


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """What the products with this adapter matrix are computed in: its own dtype, or autocast's."""
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype


def plan_sparse(*, names: Sequence[str], selected_TK: Tensor, mask_T: Tensor) -> tuple[list[Segment], Order | None]:
    """The runs of a sparse dispatch.

    Args:
        names: the experts, in gate order.
        selected_TK: int64, each token's experts as positions in `names`.
        mask_T: bool, False for padding, which uses no expert.

    Returns:
        The segments, and how assignments are grouped (None where they are the tokens in order).
    """
    top_k = selected_TK.shape[1]
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
