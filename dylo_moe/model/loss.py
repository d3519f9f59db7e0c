"""The losses of a forward: the language-model loss, whole or a chunk of tokens at a time, and the router's losses.

Shapes: B batch, S sequence, N predicted tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.routing.router import Router

LARGE_VOCABULARY = 100_000
"""The size of a vocabulary from which on logits and their copies take most of a training step's memory, for any base
that trains on one GPU: each takes 1.6 GB in fp32 for 4,096 tokens."""

CHUNK_BYTES = 256 << 20
"""The default memory of a chunk's fp32 logits: 256 tokens of 256,000 entries. Smaller chunks read the head's weights
more often, larger ones gain little (benchmarks/memory/loss_memory.py)."""


class FullLogitsNeeded(ValueError):
    """The loss of this base is more than its head and the cross-entropy."""


class TokenLosses(NamedTuple):
    """The loss of every label given the tokens before it, fp32 [batch, seq] each; 0 where there is no label."""

    trained: Tensor
    """The loss with label smoothing, through which gradients reach the hidden states."""
    plain: Tensor
    """The loss without label smoothing, detached."""


def default_chunk_size(vocab_size: int) -> int:
    """The default number of tokens per chunk, a power of two."""
    return 1 << max((CHUNK_BYTES // (4 * vocab_size)).bit_length() - 1, 0)


def chunk_loss(model: Any, wanted: int | None) -> str:
    """Choose whether a model computes its loss in chunks of tokens, as --loss_chunk_size says.

    Args:
        model: a `DyLoRAMoE`.
        wanted: the tokens of a chunk; 0: no chunks; None: chunks if the vocabulary is large and the base allows them.

    Returns:
        A sentence about the choice; empty without chunks, unless a base with a large vocabulary forbids them.

    Raises:
        ValueError: if `wanted` is out of range, or the base needs its full logits.
    """
    vocab_size, model.loss_chunk_size = model.base.config.get_text_config().vocab_size, None
    if wanted == 0 or (wanted is None and vocab_size < LARGE_VOCABULARY):
        return ""
    try:
        model.loss_chunk_size = wanted or default_chunk_size(vocab_size)
    except FullLogitsNeeded as error:
        if wanted:
            raise
        return f"the vocabulary has {vocab_size:,} entries, but full logits are kept: {error}"
    return f"loss in chunks of {model.loss_chunk_size} tokens: at most so many have their {vocab_size:,} logits at once"


def chunked_loss(
    hidden: Tensor, head: nn.Linear, labels: Tensor, *, chunk_size: int, label_smoothing: float = 0.0
) -> TokenLosses:
    """Compute the loss of every label, which equals the cross-entropy of `head(hidden)` in fp32.

        loss = (1 - a) (log sum_v exp z_v - z_label) + a (log sum_v exp z_v - mean_v z_v),    z = head(hidden)

    Logits exist for one chunk of tokens at a time. If a gradient is wanted, that of the hidden states is computed with
    them, as in Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989); Cut Cross-Entropy (Wijmans et al. 2024,
    arXiv:2411.09009) computes the logits twice instead. We differ from both: the head is frozen, each token keeps a
    loss and a gradient of its own (so that any weighting of tokens is right), and the products are PyTorch's. Tokens
    without a label are left out.

    Args:
        hidden: the input of the head, [batch, seq, hidden].
        head: a frozen linear, which is computed in its own dtype, or in autocast's.
        labels: int64 [batch, seq], -100 where nothing is predicted; each is predicted from the tokens before it.
        chunk_size: the number of tokens whose logits exist at once.
        label_smoothing: a, from 0 to below 1.

    Raises:
        ValueError: if the head is trained, for which no gradient is computed, or the shapes do not fit.
    """
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError("the output head is trained, but a loss in chunks has no gradient for it; freeze the head")
    if hidden.shape[:2] != labels.shape:
        raise ValueError(
            f"labels are {list(labels.shape)}, but {list(hidden.shape[:2])} tokens enter the head; a loss in chunks "
            "needs all of them (leave logits_to_keep out)"
        )
    labels = labels.to(hidden.device)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    if torch.compiler.is_compiling():  # where no shape may follow from a value
        rows_N = torch.arange(len(targets), device=targets.device)
    else:
        rows_N = (targets != -100).nonzero().squeeze(1)
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    trained, plain = _HeadLoss.apply(
        hidden.flatten(0, 1)[rows_N].to(dtype),
        head.weight.to(dtype),  # cast once for all chunks
        None if head.bias is None else head.bias.to(dtype),
        targets[rows_N],
        chunk_size,
        label_smoothing,
        hidden.requires_grad and torch.is_grad_enabled(),
    )
    return TokenLosses(*(_at_their_labels(losses_N, rows_N, labels) for losses_N in (trained, plain)))


def _at_their_labels(losses_N: Tensor, rows_N: Tensor, labels: Tensor) -> Tensor:
    """Put each loss at the position of its label, [batch, seq]."""
    losses = losses_N.new_zeros(labels.numel()).index_copy(0, rows_N, losses_N)
    return F.pad(losses.view(labels.shape)[:, :-1], (1, 0))


class _HeadLoss(torch.autograd.Function):
    """(states_NH, weight_VH, bias_V, targets_N, chunk_size, label_smoothing, wants_gradient) -> trained_N, plain_N."""

    @staticmethod
    def forward(
        ctx: Any,
        states_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        chunk_size: int,
        label_smoothing: float,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        gradient_NH = torch.empty_like(states_NH) if wants_gradient else None
        plain_N = torch.empty(len(states_NH), dtype=torch.float32, device=states_NH.device)
        trained_N = torch.empty_like(plain_N)
        for start in range(0, len(states_NH), chunk_size):
            chunk = slice(start, start + chunk_size)
            targets = targets_N[chunk, None]
            unlabelled, targets = targets < 0, targets.clamp_min(0)
            z = F.linear(states_NH[chunk], weight_VH, bias_V).float()
            z -= z.amax(1, keepdim=True)
            of_label, mean = z.gather(1, targets), z.mean(1, keepdim=True)
            total = z.exp_().sum(1, keepdim=True)
            plain = (total.log() - of_label).masked_fill(unlabelled, 0.0)
            uniform = (total.log() - mean).masked_fill(unlabelled, 0.0)
            plain_N[chunk] = plain[:, 0]
            trained_N[chunk] = torch.lerp(plain, uniform, label_smoothing)[:, 0]
            if gradient_NH is not None:
                z /= total
                z.scatter_add_(1, targets, torch.full_like(of_label, label_smoothing - 1))
                if label_smoothing > 0:
                    z -= label_smoothing / z.shape[1]
                gradient_NH[chunk] = z.masked_fill_(unlabelled, 0.0).to(weight_VH.dtype) @ weight_VH
        ctx.mark_non_differentiable(plain_N)
        ctx.save_for_backward(gradient_NH)
        return trained_N, plain_N

    @staticmethod
    def backward(ctx: Any, trained_N: Tensor, plain_N: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        return (trained_N[:, None] * gradient_NH).to(gradient_NH.dtype), None, None, None, None, None, None


def losses_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the plain losses of `TokenLosses` from all logits.

    Args:
        logits: [batch, seq, vocabulary].
        labels: int64 [batch, seq], -100 where nothing is predicted.
    """
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=logits.device)
    for row in range(len(labels)):  # row by row: a float copy of all logits would double the memory
        target = labels[row, 1:].to(logits.device)
        losses[row, 1:] = F.cross_entropy(logits[row, :-1].float(), target, ignore_index=-100, reduction="none")
    return losses


@torch.no_grad()
def check_plain_head(base: PreTrainedModel) -> None:
    """Check, on three tokens, that a base's logits are its head's output, and its loss their shifted cross-entropy.

    Args:
        base: called with `input_ids` and `labels`.

    Raises:
        FullLogitsNeeded: if they are not, with the difference.
    """
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise FullLogitsNeeded(
            f"the output head of {type(base).__name__} is a {type(head).__name__}, not a plain linear"
        )
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise FullLogitsNeeded(f"the output head of {type(base).__name__} is trained")
    seen: list[tuple[Tensor, Tensor, int]] = []

    def keep(module: nn.Module, args: tuple, logits: Tensor) -> None:
        seen.append((args[0], logits, logits._version))

    ids = torch.arange(3, device=head.weight.device)[None] % len(head.weight)
    handle = head.register_forward_hook(keep)
    try:
        out = base(input_ids=ids, labels=ids, use_cache=False)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0][0].shape[:2] != ids.shape:
        raise FullLogitsNeeded(f"{type(base).__name__} does not run its output head once over all tokens")
    _, logits, version = seen[0]
    if out.logits is not logits or logits._version != version:
        raise FullLogitsNeeded(
            f"the logits of {type(base).__name__} are not what its head gives: they are capped, scaled or converted"
        )
    loss = losses_from_logits(logits, ids).sum() / 2
    if not torch.allclose(loss, out.loss.float(), rtol=1e-4, equal_nan=True):
        raise FullLogitsNeeded(
            f"the loss of {type(base).__name__} is {float(out.loss):.6g} where the cross-entropy of its logits is "
            f"{float(loss):.6g}"
        )


def smoothed_loss(out: Any, labels: Tensor, count: Tensor, *, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Compute the loss of a base that computed all logits, with label smoothing and without.

    Args:
        out: the base's output; its `loss` is the plain one.
        labels: int64 [batch, seq], -100 where nothing is predicted.
        count: the number that the loss is divided by.
        label_smoothing: from 0 to below 1.

    Raises:
        ValueError: if smoothing needs logits that the base does not return.
    """
    if label_smoothing == 0:
        return out.loss, out.loss
    uniform = _uniform_loss(out.get("logits"), labels) / count
    return (1 - label_smoothing) * out.loss + label_smoothing * uniform, out.loss


def _uniform_loss(logits: Tensor | None, labels: Tensor) -> Tensor:
    """The sum over the predicted tokens of the cross-entropy with a uniform distribution over the vocabulary."""
    if logits is None:
        raise ValueError("label_smoothing needs logits, but the base fuses its head with its loss; set loss_chunk_size")
    counts = labels[:, 1:] != -100
    logits = (
        logits[:, :-1].float().masked_fill(~counts[..., None], 0.0)
    )  # unlabelled tokens may have any logits, even NaN
    return ((logits.logsumexp(-1) - logits.mean(-1)) * counts).sum()


def add_router_losses(
    result: Any,
    router: Router,
    *,
    labels: Tensor,
    balance_coefficient: float,
    num_items: Tensor | int | None,
    num_tokens: Tensor | int | None,
) -> None:
    """Add the router's losses to an output that has a `loss` and a `routing`, and their weighted sum to its `loss`.

    Args:
        result: the output, which gets `balance_loss`, `z_loss`, `entropy_loss` and `aux_loss`.
        labels: int64 [batch, seq], -100 where nothing is predicted.
        balance_coefficient: the weight of the balance loss; the router's configuration has the other two weights.
        num_items: the number of predicted tokens of the whole optimizer step.
        num_tokens: the number of real tokens of the whole optimizer step, by which the losses are divided. If only
            `num_items` is known, the losses are over the predicted tokens; if neither is, over this call's real tokens.
    """
    tokens = None
    if num_tokens is None and num_items is not None:
        tokens, num_tokens = F.pad(labels[:, 1:] != -100, (0, 1)), num_items
    losses = router.losses(result.routing, tokens=tokens, num_tokens=num_tokens)
    result.balance_loss, result.z_loss, result.entropy_loss = losses
    result.aux_loss = (
        balance_coefficient * losses.balance
        + router.config.z_loss_coefficient * losses.z
        + router.config.entropy_coefficient * losses.entropy
    )
    result.loss = result.loss + result.aux_loss
