"""What to watch while experts train: utilisation, gradients, the gate's way, and what looks wrong."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .meter import Reading
from .model import DyLoRAMoE

DEAD_SHARE = 0.01
"""An expert that gets less than this share of the tokens is called dead."""
ALARM_TOKENS = 4096
"""What holds for fewer tokens is chance."""
COLLAPSED_SHARE = 0.9
"""One of several experts that gets more than this share of the tokens, on several kinds of data, has taken over."""


def as_metrics(reading: Reading) -> dict[str, float]:
    """A training log's routing metrics under their stable names."""
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


def dead_experts(readings: Mapping[str, Reading]) -> list[str]:
    """The experts with less than `DEAD_SHARE` of the tokens of every dataset."""
    experts = next(iter(readings.values())).shares
    return [name for name in experts if all(reading.shares[name] < DEAD_SHARE for reading in readings.values())]


def alarms(reading: Reading) -> dict[str, str]:
    """What looks wrong in a stretch of training, with advice; by a name that stays the same while it lasts."""
    if len(reading.shares) == 1:
        return {}
    found = {
        f"dead {name}": f"expert {name} is dead: {share:.1%} of the tokens. Raise --balance_coefficient, or use fewer "
        "experts"
        for name, share in reading.shares.items()
        if share < DEAD_SHARE
    }
    busiest = max(reading.shares, key=lambda name: reading.shares[name])
    if len(reading.domain_shares) > 1 and reading.shares[busiest] > COLLAPSED_SHARE:
        found["collapse"] = (
            f"the router has collapsed: {reading.shares[busiest]:.1%} of the tokens go to {busiest}. Raise "
            "--balance_coefficient, lower --learning_rate, or begin with text of every kind in the first rows"
        )
    return found


def gradient_norms(model: DyLoRAMoE, *, scale: float = 1.0) -> dict[str, Tensor]:
    """2-norm of the gradients of each trained expert's adapter and of the router; fp32 scalars, on the model's device.

    Args:
        scale: what the gradients are multiplied by, of a gradient scaler.
    """
    learning = [expert.name for expert in model.experts if expert.trainable]
    groups = {name: list(model.experts.parameters(name)) for name in learning}
    groups["router"] = list(model.router.parameters())
    norms = {}
    for name, parameters in groups.items():
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if grads:
            norms[name] = torch.stack(torch._foreach_norm(grads)).float().norm() / scale
    return norms


def gate_drift(start: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each gate row has moved since training began, in parts of its length then."""
    return {
        name: float((now[name] - row).norm() / row.norm().clamp_min(1e-12))
        for name, row in start.items()
        if name in now
    }


class AlarmBell:
    """Tells each alarm when it begins and when it is over; it begins once it has held for `ALARM_TOKENS` tokens."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        """Tokens since each alarm has held."""

    def changes(self, found: dict[str, str], num_tokens: int) -> list[str]:
        """What to tell, given what looks wrong in the newest stretch and how long that was."""
        before = self.held
        self.held = {name: before.get(name, 0) + num_tokens for name in found}
        begun = [found[name] for name, held in self.held.items() if before.get(name, 0) < ALARM_TOKENS <= held]
        over = [f"over: {name}" for name, held in before.items() if held >= ALARM_TOKENS and name not in found]
        return begun + over
