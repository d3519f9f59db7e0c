"""Make one expert of two: the best approximation of their weighted mean by one LoRA of a given rank.

Shapes: D in, O out, R sum of both experts' ranks, K the smaller of R, D and O.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dylo_moe.experts.expert import ExpertPool, check_name
from dylo_moe.utils.words import listed

LITTLE_KEPT = 0.9
"""The share of the mean's energy below which a merge is warned of."""


class Merge(NamedTuple):
    """What a merge of two experts kept of them."""

    expert: str
    """The name of the merged expert."""
    rank: int
    weights: tuple[float, float]
    """The weights of the two experts in the mean; they sum to 1."""
    kept: float
    """The share of the energy (squared Frobenius norm) of the weighted mean that the rank keeps, over all linears."""
    worst: float
    """The smallest such share of a single linear."""
    worst_linear: str
    """The linear of that share."""
    alike: float
    """The cosine between both experts' deltas over all linears: 1 the same direction, 0 nothing in common. It says more
    of how the two began than of their skills: fresh experts of one skill are nearly orthogonal."""

    def in_words(self, first: str, second: str) -> str:
        """Say what became of two experts, and what was kept of them."""
        return (
            f"{first} and {second} became {self.expert}, of rank {self.rank}: their mean with weights "
            f"{self.weights[0]:.2f} and {self.weights[1]:.2f}, of whose energy {self.kept:.1%} are kept (worst "
            f"linear {self.worst:.1%}, {self.worst_linear}); cosine of the two {self.alike:.2f}."
        )


class Factors(NamedTuple):
    """Both experts' deltas in one linear, each B scaled so that B A is the delta; fp64, on the CPU."""

    ups: tuple[Tensor, Tensor]
    """[O, r] each."""
    downs: tuple[Tensor, Tensor]
    """[r, D] each."""


class Approximation(NamedTuple):
    """The best approximation of a delta: up @ down, with orthonormal rows of `down`."""

    up: Tensor
    """fp64 [O, r]."""
    down: Tensor
    """fp64 [r, D]."""
    kept: float
    """Its energy."""
    energy: float
    """The energy of the delta."""


@torch.no_grad()
def merge_experts(
    pool: ExpertPool, first: str, second: str, *, weights: tuple[float, float], name: str, rank: int | None
) -> Merge:
    """Replace two experts by one, the last of the pool, whose delta is the best of its rank for their weighted mean.

    For each linear the factors are put side by side and cut to the rank by a truncated SVD (Eckart and Young 1936),
    through QR of the thin factors in fp64, so that no [O, D] matrix is ever made. `add_weighted_adapter` of PEFT with
    combination_type="svd" has the same result, but makes the whole delta and its full SVD in the adapters' dtype, sets
    alpha to the rank whatever the pool's scaling, and does not say what was kept; tests compare the two.

    Args:
        weights: of the two in the mean; they sum to 1.
        name: of the merged expert; it may be that of one of the two.
        rank: of the merged expert; default the larger of the two ranks.

    Raises:
        ValueError: for experts that cannot be merged, or a name or rank that is none; nothing has changed then.
    """
    rank = max(pool[first].rank, pool[second].rank) if rank is None else rank
    config = pool.config_for(rank, like=first)
    check_merge(pool, first, second, name)
    found = [factors_of(layer, first, second) for layer in pool.layers if first in layer.adapters]
    trainable = pool[first].trainable or pool[second].trainable
    skills = dict.fromkeys(skill for old in (first, second) if (skill := pool[old].skill))
    if name in (first, second):  # the other one stays for now, as a pool is never empty
        pool.remove(name)
    expert = pool.add(name, config, mature=True, skill=", ".join(skills) or None)
    expert.trainable = trainable
    pool.pack()
    adapted = [(path, layer) for path, layer in pool.named_layers() if name in layer.adapters]
    shares = [(_write(layer, name, item, weights), path) for (path, layer), item in zip(adapted, found, strict=True)]
    for old in (first, second):
        if old != name:
            pool.remove(old)
    kept, energy = (sum(getattr(part, field) for part, _ in shares) for field in ("kept", "energy"))
    worst, worst_linear = min((_share(part.kept, part.energy), path) for part, path in shares)
    return Merge(name, rank, weights, _share(kept, energy), worst, worst_linear, _cosine(found))


def check_merge(pool: ExpertPool, first: str, second: str, name: str) -> None:
    """Raise ValueError, with all problems, unless two experts of a pool can become one of that name."""
    problems = []
    if first == second:
        problems.append(f"{first!r} is named twice; a merge takes two experts")
    problems += [
        f"expert {old!r} is still learning; mature() it first" for old in (first, second) if not pool[old].mature
    ]
    linears = [{path for path, layer in pool.named_layers() if old in layer.adapters} for old in (first, second)]
    if linears[0] != linears[1]:
        problems.append(f"{first!r} and {second!r} adapt different linears: {listed(sorted(linears[0] ^ linears[1]))}")
    if name not in (first, second):
        try:
            check_name(name, taken=pool, modules=pool.base_modules())
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"cannot merge {first!r} and {second!r}: " + "; ".join(problems))


def factors_of(layer: Any, first: str, second: str) -> Factors:
    """Both experts' deltas in one routed linear."""
    adapters = [layer.adapters[name] for name in (first, second)]
    ups = [cast(Tensor, item.up.weight).detach().double().cpu() * item.shape.scaling for item in adapters]
    downs = [cast(Tensor, item.down.weight).detach().double().cpu() for item in adapters]
    return Factors((ups[0], ups[1]), (downs[0], downs[1]))


def approximate(factors: Factors, weights: tuple[float, float], rank: int) -> Approximation:
    """The best approximation of rank `rank` for the weighted sum of two deltas."""
    up_OR = torch.cat([weight * up for weight, up in zip(weights, factors.ups, strict=True)], 1)
    down_RD = torch.cat(factors.downs)
    left_OK, upper_KR = torch.linalg.qr(up_OR)
    right_DK, lower_KR = torch.linalg.qr(down_RD.T)
    u_KK, values_K, v_KK = torch.linalg.svd(upper_KR @ lower_KR.T, full_matrices=False)
    energy_K = values_K.square()
    up_OK, down_KD = left_OK @ (u_KK * values_K), v_KK @ right_DK.T
    spare = max(rank - len(values_K), 0)  # of a rank that is larger than both experts' together
    up = torch.cat([up_OK[:, :rank], up_OK.new_zeros(len(up_OK), spare)], 1)
    down = torch.cat([down_KD[:rank], down_KD.new_zeros(spare, down_KD.shape[1])])
    return Approximation(up, down, float(energy_K[:rank].sum()), float(energy_K.sum()))


def _write(layer: Any, name: str, factors: Factors, weights: tuple[float, float]) -> Approximation:
    """Give the merged expert its matrices in one linear."""
    adapter = layer.adapters[name]
    part = approximate(factors, weights, adapter.shape.rank)
    cast(nn.Parameter, adapter.up.weight).copy_(part.up / adapter.shape.scaling)
    cast(nn.Parameter, adapter.down.weight).copy_(part.down)
    return part


def _share(kept: float, energy: float) -> float:
    return kept / energy if energy > 0 else 1.0


def _cosine(found: list[Factors]) -> float:
    """The cosine between two experts' deltas, over all linears; 0 where one of them is zero."""

    def product(one: int, other: int) -> float:
        parts = [(item.ups[one].T @ item.ups[other]) * (item.downs[one] @ item.downs[other].T) for item in found]
        return float(sum(part.sum() for part in parts))

    norm = (product(0, 0) * product(1, 1)) ** 0.5
    return product(0, 1) / norm if norm > 0 else 0.0
