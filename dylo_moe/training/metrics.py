"""Measures of a stretch of training or evaluation, per domain: its loss, its routing, and the router's entropy.

Shapes: B batch, S sequence, E experts, G domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dylo_moe.model.loss import losses_from_logits
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.router import Routing


class MeterReading(NamedTuple):
    """Means since the last reset; shares are fractions, losses and entropies are in nats per token."""

    loss: float
    """Language-model loss over all trained tokens."""
    domain_losses: dict[str, float]
    shares: dict[str, float]
    """The share of all routed tokens that each expert got; 0 where none is routed."""
    domain_shares: dict[str, dict[str, float]]
    """The share of each domain's routed tokens that each expert got; without the domains that have none."""
    token_entropy: float
    """Mean entropy of one token's gate probabilities; low: the router is sure of each token."""
    num_tokens: int
    """Real tokens, without padding."""
    average_entropy: float
    """Entropy of the mean probabilities; high (at most log of the number of experts): all experts are used."""
    num_routed: int
    """The tokens of these that are routed: all, or with response granularity those of answers."""


@torch.no_grad()
def token_losses(out: Any, labels: Tensor) -> Tensor:
    """The plain loss of each label, fp32 [batch, seq], from a forward's output; 0 where there is no label.

    Args:
        out: the output of `DyLoRAMoE.forward`, with logits, or with token_losses in their place.
        labels: int64 [batch, seq], -100 where nothing is predicted.

    Raises:
        ValueError: for an output with neither, as Liger's fused loss leaves it.
    """
    losses = getattr(out, "token_losses", None)
    if losses is not None:
        return losses
    if out.get("logits") is None:
        raise ValueError(
            "the base fuses its head with its loss, so that the loss of each dataset cannot be told; set the model's "
            "loss_chunk_size, or leave the base's fused loss out"
        )
    return losses_from_logits(out.logits, labels)


class Meter:
    """Sums losses and routing over batches, on the batches' device; `read` turns the sums into means.

    Args:
        domains: names of the datasets, in the order of the batches' `domain` index.
        experts: names, in gate order.
    """

    def __init__(self, domains: list[str], experts: tuple[str, ...]) -> None:
        self.domains = domains
        self.experts = experts
        self.sums: Tensor | None = None

    @torch.no_grad()
    def add(
        self, *, losses: Tensor, labels: Tensor, routing: Routing, domain: Tensor, mask: Tensor | None = None
    ) -> None:
        """Add one batch.

        Args:
            losses: the loss of each label, fp32 [batch, seq], as `token_losses` returns it.
            labels: int64 [batch, seq], -100 where nothing is predicted.
            routing: the routing of the same forward.
            domain: int64 [batch], each row's position in `domains`, or [batch, seq], each token's.
            mask: [batch, seq], 0 on padding; None: all tokens that are not routed are padding.
        """
        num_experts, (batch, seq) = len(self.experts), labels.shape
        sums_BSX = torch.zeros(batch, seq, 5 + 2 * num_experts, dtype=torch.float64, device=losses.device)
        sums_BSX[:, :, 0] = losses.double()
        sums_BSX[:, 1:, 1] = (labels[:, 1:] != -100).double()
        sums_BSX[:, :, 2] = routing.mask.double()
        sums_BSX[:, :, 4] = (routing.mask if mask is None else mask).double()
        sums_BSX[..., 5 : 5 + num_experts] = routing.weights.double()
        if routing.logits is not None:
            p_BSE = routing.probabilities * routing.mask[..., None]
            sums_BSX[:, :, 3] = torch.special.entr(p_BSE).sum(-1)
            sums_BSX[..., 5 + num_experts :] = p_BSE.double()
        domain = domain.to(losses.device)
        sums = sums_BSX.sum(1) if domain.dim() == 1 else sums_BSX.flatten(0, 1)
        if self.sums is None:
            self.sums = sums.new_zeros(len(self.domains), sums.shape[1])
        self.sums.index_add_(0, domain.flatten(), sums)

    def reset(self) -> None:
        """Forget all batches."""
        self.sums = None

    def read(self) -> MeterReading | None:
        """The means since the last reset; None where no token was added."""
        if self.sums is None or float(self.sums[:, 4].sum()) == 0:
            return None
        sums_GX, num_experts = self.sums.cpu(), len(self.experts)
        shares_GE = sums_GX[:, 5 : 5 + num_experts]
        total = sums_GX.sum(0)
        num_routed = total[2].clamp_min(1)  # with response granularity there may be no answer
        mean_p_E = total[5 + num_experts :] / num_routed
        return MeterReading(
            loss=float(total[0] / total[1].clamp_min(1)),
            domain_losses={
                domain: float(sums_GX[index, 0] / sums_GX[index, 1])
                for index, domain in enumerate(self.domains)
                if sums_GX[index, 1] > 0
            },
            shares=dict(zip(self.experts, (shares_GE.sum(0) / num_routed).tolist(), strict=True)),
            domain_shares={
                domain: dict(zip(self.experts, (shares_GE[index] / sums_GX[index, 2]).tolist(), strict=True))
                for index, domain in enumerate(self.domains)
                if sums_GX[index, 2] > 0
            },
            num_tokens=int(total[4]),
            token_entropy=float(total[3] / num_routed),
            average_entropy=float(torch.special.entr(mean_p_E).sum()),
            num_routed=int(total[2]),
        )


def as_metrics(reading: MeterReading) -> dict[str, float]:
    """The metrics of a training log, under the names that metrics.jsonl keeps from version to version."""
    metrics = {
        "token_entropy": reading.token_entropy,
        "average_entropy": reading.average_entropy,
        "load_imbalance": load_imbalance(reading.shares),
    }
    metrics |= {f"loss_{domain}": loss for domain, loss in reading.domain_losses.items()}
    metrics |= {f"share_{expert}": share for expert, share in reading.shares.items()}
    for domain, shares in reading.domain_shares.items():
        metrics |= {f"share_{domain}_{expert}": share for expert, share in shares.items()}
    return metrics


def load_imbalance(shares: Mapping[str, float]) -> float:
    """The busiest expert's share over the mean share: 1 is even, the number of experts is all on one."""
    total = sum(shares.values())
    return max(shares.values()) * len(shares) / total if total else 1.0


def gradient_norms(model: DyLoRAMoE, *, scale: float = 1.0) -> dict[str, Tensor]:
    """2-norm of the gradients of each trained expert's adapter and of the router; fp32 scalars, on the model's device.

    Args:
        scale: the factor by which a gradient scaler has multiplied the gradients.
    """
    learning = [expert.name for expert in model.experts.everyone if expert.trainable]
    groups = {name: list(model.experts.parameters(name)) for name in learning}
    groups["router"] = list(model.router.parameters())
    norms = {}
    for name, parameters in groups.items():
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if grads:
            norms[name] = torch.stack(torch._foreach_norm(grads)).float().norm() / scale
    return norms


def gate_drift(start: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each gate row has moved since training began, relative to its length then."""
    return {
        name: float((now[name] - row).norm() / row.norm().clamp_min(1e-12))
        for name, row in start.items()
        if name in now
    }
