"""What the router computes, one token at a time, in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def naive_causal_mean(hidden: Tensor, *, mask: Tensor, half_life: float) -> Tensor:
    """f_t = sum_{u<=t} 2^(-(t-u)/half_life) x_u / sum_{u<=t} 2^(-(t-u)/half_life) over real tokens."""
    batch, seq, width = hidden.shape
    features = torch.zeros(batch, seq, width, dtype=torch.float64)
    for row in range(batch):
        seen: list[Tensor] = []
        for t in range(seq):
            if mask[row, t]:
                x = hidden[row, t].double()
                x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
                seen.append(x)
            ages = range(len(seen) - 1, -1, -1)
            weights = [2.0 ** (-age / half_life) for age in ages]
            if seen:
                features[row, t] = sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights)
    return features


def naive_losses(logits: Tensor, *, tokens: Tensor, shares: Tensor) -> tuple[float, float, float]:
    """(balance, z, entropy) as means over the tokens that count."""
    num_experts = logits.shape[-1]
    balance = z = entropy = 0.0
    count = int(tokens.sum())
    for row in range(logits.shape[0]):
        for t in range(logits.shape[1]):
            if not tokens[row, t]:
                continue
            values = [math.exp(value) for value in logits[row, t].double().tolist()]
            total = sum(values)
            probabilities = [value / total for value in values]
            balance += num_experts * sum(f * p for f, p in zip(shares.tolist(), probabilities, strict=True)) / count
            z += math.log(total) ** 2 / count
            entropy -= sum(p * math.log(p) for p in probabilities) / count
    return balance, z, entropy
