"""The mathematics of one routed linear: result + sum_e w_e s_e B_e A_e x, densely or grouped by expert.

Shapes: T tokens of all rows, N assignments (tokens x selected experts), D in, O out, W either of them, r rank of one
        expert, G experts that are used, R sum of their ranks, or in the grouped form the largest of them.

Both forms add into `result`, the fresh output of a frozen linear. They define their own backward, because autograd
would keep and move more data, record operations for every group, and compute gradients of frozen experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dylo_moe.experts.memory_layout import stacked
from dylo_moe.routing.dispatch import Dense, Grouped

ALIGNMENT_BYTES = 16
"""PyTorch's grouped product needs rows whose length in bytes is a multiple of this."""


def mix(x_TD: Tensor, result: Tensor, *, part: Dense | Grouped, downs: list[Tensor], ups: list[Tensor]) -> Tensor:
    """Add the output of the experts to that of the base's linear.

    Args:
        x_TD: the input of the experts, in the dtype that they are computed in.
        result: [..., O], the base's output; it is changed in place, except under torch.compile.
        part: the experts that are used, with their tokens and weights.
        downs: the matrix A of each of `part.names`, [r, D].
        ups: the transposed matrix B of each, [r, O].
    """
    if len(downs) == 1 and not torch.is_grad_enabled() and _is_plain(x_TD, result, part, downs[0]):
        result_TO = result.view(-1, result.shape[-1])
        if isinstance(part, Grouped):
            x_TD, result_TO = x_TD[part.span], result_TO[part.span]
        result_TO.addmm_(torch.mm(x_TD, downs[0].t()), ups[0], alpha=part.scaling)
        return result
    if torch.compiler.is_compiling():
        return _traced(x_TD, result, part=part, downs=downs, ups=ups)
    weights = part.weights_TR if isinstance(part, Dense) else part.weights_N1
    operation: Any = _DenseMix if isinstance(part, Dense) else _GroupedMix
    if not torch.is_grad_enabled():
        operation.add(x_TD, result, weights, part, downs, ups)
        return result
    if result._is_view():  # Conv1D's is a view; autograd would copy the gradient of a view that is written to
        result = result.clone()
    return operation.apply(x_TD, result, weights, part, *downs, *ups)


def _is_plain(x_TD: Tensor, result: Tensor, part: Dense | Grouped, down: Tensor) -> bool:
    """Whether one expert is used, for all tokens, as in most steps of decoding, or for some that stand side by side, as
    at the end of a prompt, and all tensors have one dtype."""
    alone = part.weights_TR is None if isinstance(part, Dense) else part.span is not None and part.weights_N1 is None
    return alone and x_TD.dtype == result.dtype == down.dtype


def _traced(x_TD: Tensor, result: Tensor, *, part: Dense | Grouped, downs: list[Tensor], ups: list[Tensor]) -> Tensor:
    """The dense form in operations that torch.compile can trace."""
    assert isinstance(part, Dense)
    dtype = x_TD.dtype
    hidden_TR = F.linear(x_TD, stacked(downs).to(dtype)) * (1.0 if part.weights_TR is None else part.weights_TR)
    b_RO, result_TO = stacked(ups).to(dtype), result.view(-1, result.shape[-1])
    if result.dtype == dtype:
        return torch.addmm(result_TO, hidden_TR, b_RO, alpha=part.scaling).view_as(result)
    return (result_TO + (hidden_TR * part.scaling) @ b_RO).to(result.dtype).view_as(result)


class _DenseMix(torch.autograd.Function):
    """Dense form: hidden = x A^T; y = result + (hidden * weights) B, over the stacked experts."""

    @staticmethod
    def add(
        x_TD: Tensor, result: Tensor, weights_TR: Tensor | None, part: Dense, downs: list[Tensor], ups: list[Tensor]
    ) -> Tensor:
        """Add into `result`, and return the hidden activations x A^T without weights, [T, R]."""
        hidden_TR = torch.mm(x_TD, stacked(downs).to(x_TD.dtype).t())
        weighted_TR = hidden_TR if weights_TR is None else hidden_TR * weights_TR
        b_RO = stacked(ups).to(x_TD.dtype)
        result_TO = result.view(-1, result.shape[-1])
        if result.dtype == x_TD.dtype:
            result_TO.addmm_(weighted_TR, b_RO, alpha=part.scaling)
        else:
            result_TO.copy_(result_TO + (weighted_TR * part.scaling) @ b_RO)
        return hidden_TR

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, result: Tensor, weights_TR: Any, part: Dense, *matrices: Tensor) -> Tensor:
        hidden_TR = _DenseMix.add(x_TD, result, weights_TR, part, *_halves(matrices))
        _keep(ctx, part, x_TD, hidden_TR, weights_TR, matrices)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, hidden_TR, weights_TR, *matrices = ctx.saved_tensors
        needs_x, _, needs_weights, _, *learns = ctx.needs_input_grad
        downs, ups = _halves(matrices)
        dtype, scaling = hidden_TR.dtype, ctx.part.scaling
        grad_TO = grad.reshape(-1, grad.shape[-1]).to(dtype)
        grad_TR = torch.mm(grad_TO, stacked(ups).to(dtype).t())
        grad_weights = grad_TR * hidden_TR * scaling if needs_weights else None
        grad_TR.mul_(scaling if weights_TR is None else weights_TR)
        grad_x = torch.mm(grad_TR, stacked(downs).to(dtype)) if needs_x else None
        grads: list[Tensor | None] = [None] * len(matrices)
        if any(learns):
            ranks = [down.shape[0] for down in downs]
            weighted_TR = hidden_TR * (scaling if weights_TR is None else weights_TR)
            pairs = ((grad_TR, x_TD), (weighted_TR, grad_TO))
            if all(learns):  # one product for all experts
                grads = [part for left_TR, right_TW in pairs for part in torch.mm(left_TR.t(), right_TW).split(ranks)]
            else:
                columns = [(left_Tr, right_TW) for left_TR, right_TW in pairs for left_Tr in left_TR.split(ranks, 1)]
                grads = [_outer(*pair) if learn else None for pair, learn in zip(columns, learns, strict=True)]
        return grad_x, grad, grad_weights, None, *grads


class _GroupedMix(torch.autograd.Function):
    """Grouped form: gather the tokens of each expert, compute only the selected products, and add the results back."""

    @staticmethod
    def add(
        x_TD: Tensor, result: Tensor, weights_N1: Tensor | None, part: Grouped, downs: list[Tensor], ups: list[Tensor]
    ) -> Tensor:
        """Add into `result`, and return the hidden activations x A^T without weights, [N, R]."""
        hidden_NR = _grouped_product(_gathered(x_TD, part), downs, part, transposed=True)
        weighted_NR = hidden_NR * (part.scaling if weights_N1 is None else weights_N1)
        delta_NO = _grouped_product(weighted_NR, ups, part)
        result_TO = result.view(-1, result.shape[-1])
        if result.dtype == x_TD.dtype:
            _add_rows(result_TO, delta_NO, part)
        else:
            result_TO.copy_(_add_rows(result_TO.to(x_TD.dtype), delta_NO, part))
        return hidden_NR

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, result: Tensor, weights_N1: Any, part: Grouped, *matrices: Tensor) -> Tensor:
        hidden_NR = _GroupedMix.add(x_TD, result, weights_N1, part, *_halves(matrices))
        _keep(ctx, part, x_TD, hidden_NR, weights_N1, matrices)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, hidden_NR, weights_N1, *matrices = ctx.saved_tensors
        needs_x, _, needs_weights, _, *learns = ctx.needs_input_grad
        part, dtype = ctx.part, hidden_NR.dtype
        downs, ups = _halves(matrices)
        grad_TO = grad.reshape(-1, grad.shape[-1]).to(dtype)
        grad_NO = _gathered(grad_TO, part)
        grad_NR = _grouped_product(grad_NO, ups, part, transposed=True)
        grad_weights = (grad_NR * hidden_NR).sum(1, keepdim=True) if needs_weights else None
        grad_NR.mul_(part.scaling if weights_N1 is None else weights_N1)
        grad_x = None
        if needs_x:
            grad_ND = _grouped_product(grad_NR, downs, part)
            whole = part.rows_N is None
            grad_x = grad_ND if whole else _add_rows(grad_ND.new_zeros(len(grad_TO), grad_ND.shape[1]), grad_ND, part)
        grads: list[Tensor | None] = [None] * len(matrices)
        for index, (learn, matrix) in enumerate(zip(learns, matrices, strict=True)):
            if not learn:
                continue
            own = _span(part, index % len(downs))
            if index < len(downs):
                rows_n = own if part.rows_N is None else part.rows_N[own]
                grads[index] = _outer(grad_NR[own, : len(matrix)], x_TD[rows_n])
            else:
                weighted_nr = hidden_NR[own, : len(matrix)] * (part.scaling if weights_N1 is None else weights_N1[own])
                grads[index] = _outer(weighted_nr, grad_NO[own])
        return grad_x, grad, grad_weights, None, *grads


def _halves(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split the matrices of all experts into the As and the Bs."""
    half = len(matrices) // 2
    return list(matrices[:half]), list(matrices[half:])


def _keep(
    ctx: Any, part: Dense | Grouped, x_TD: Tensor, hidden: Tensor, weights: Tensor | None, matrices: Sequence[Tensor]
) -> None:
    """Save what backward needs; the input is needed only if some expert learns."""
    ctx.part = part
    learns = any(ctx.needs_input_grad[4:])
    ctx.save_for_backward(x_TD if learns else None, hidden, weights, *matrices)


def _outer(left_nr: Tensor, right_nW: Tensor) -> Tensor:
    """The gradient of one expert's matrix, [r, W]."""
    return torch.mm(left_nr.t(), right_nW)


def _span(part: Grouped, index: int) -> slice:
    """The range of the assignments of one group."""
    start = sum(part.lengths[:index])
    return slice(start, start + part.lengths[index])


def _gathered(x_TW: Tensor, part: Grouped) -> Tensor:
    return x_TW if part.rows_N is None else x_TW.index_select(0, part.rows_N)


def _add_rows(total_TW: Tensor, part_NW: Tensor, part: Grouped) -> Tensor:
    """Add the row of each assignment to that of its token, in place."""
    return total_TW.add_(part_NW) if part.rows_N is None else total_TW.index_add_(0, part.rows_N, part_NW)


def _grouped_product(x_NV: Tensor, matrices: list[Tensor], part: Grouped, *, transposed: bool = False) -> Tensor:
    """Multiply the rows of each group by the group's matrix [v, w], or [w, v] if `transposed`, into [N, W].

    If ranks differ, the columns of V beyond a smaller rank are not read, and those of W are zero.
    """
    if x_NV.dtype != matrices[0].dtype:
        matrices = [matrix.to(x_NV.dtype) for matrix in matrices]
    if len(matrices) == 1:
        return torch.mm(x_NV, matrices[0].t() if transposed else matrices[0])
    shapes = {matrix.shape for matrix in matrices}
    if len(shapes) == 1 and has_grouped_kernel(x_NV, matrices[0]):
        bank_GVW = torch.stack(matrices)
        return F.grouped_mm(x_NV, bank_GVW.transpose(1, 2) if transposed else bank_GVW, offs=part.ends_G)
    width = max(shape[0 if transposed else 1] for shape in shapes)
    y_NW = x_NV.new_zeros(len(x_NV), width)
    for x_nV, matrix, y_nW in zip(x_NV.split(part.lengths), matrices, y_NW.split(part.lengths), strict=True):
        matrix_vw = matrix.t() if transposed else matrix
        y_nW[:, : matrix_vw.shape[1]] = torch.mm(x_nV[:, : matrix_vw.shape[0]], matrix_vw)
    return y_NW


def has_grouped_kernel(x_NV: Tensor, matrix: Tensor) -> bool:
    """Whether PyTorch can multiply all groups in one call: not in fp64 or odd widths, and on a GPU only in bf16."""
    dtypes = (torch.bfloat16,) if x_NV.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    aligned = all(width * x_NV.itemsize % ALIGNMENT_BYTES == 0 for width in matrix.shape)
    return aligned and x_NV.dtype in dtypes and hasattr(F, "grouped_mm")
