"""Pad an adapter of any rank to a rank that vLLM's servers have; the padded adapter computes the same, bit for bit.

A gets rows of zeros and B columns of zeros, so that every product gets terms of exactly zero. The scaling must stay the
same floating-point number, though it is stored as alpha / r. Where the linears of one adapter differ in scaling, a
factor that is a power of two is multiplied into B, which rounds nothing; any other is stored in `alpha_pattern`.

Shapes: D in, O out, r rank of one linear, R rank of all.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from dylo_moe.commands.export.serving_rules import SERVER_RANKS
from dylo_moe.experts.config import lora_scale
from dylo_moe.utils.words import counted

A, B = ".lora_A.weight", ".lora_B.weight"

PREFIX = "base_model.model."


class Linear(NamedTuple):
    """The matrices and the scaling of one adapted linear."""

    down: Tensor
    """The matrix A, [r, D]."""
    up: Tensor
    """The matrix B, [O, r]."""
    scaling: float


class PaddedAdapter(NamedTuple):
    """An adapter as it will be written to files."""

    config: dict[str, Any]
    """The content of adapter_config.json."""
    state: dict[str, Tensor]
    """The tensors of adapter_model.safetensors."""
    ranks: list[int]
    """The ranks that the adapter's own linears had, each once, ascending."""
    notes: list[str]
    """Sentences that a user of the adapter should know."""


def padded(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    shared: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None,
) -> PaddedAdapter:
    """Pad an adapter for vLLM's servers; one that needs no padding keeps its tensors and its numbers.

    Args:
        config: the content of the adapter's adapter_config.json, as PEFT writes it.
        state: the adapter's tensors, as PEFT names them in files.
        shared: config and tensors of an adapter that is always used beside it; the result holds both.

    Raises:
        ValueError: for a rank above vLLM's largest, or tensors that are not pairs of A and B.
    """
    linears = own = linears_of(config, state)
    own_ranks = sorted({linear.down.shape[0] for linear in linears.values()})
    if shared is not None:
        linears = side_by_side(linears_of(*shared), own)
    ranks = sorted({linear.down.shape[0] for linear in linears.values()})
    if ranks[-1] > SERVER_RANKS[-1]:
        raise ValueError(f"its rank is {ranks[-1]}, above {SERVER_RANKS[-1]}, the largest that vLLM serves")
    values = {**config, "rank_pattern": {}, "alpha_pattern": {}}
    if not isinstance(config["target_modules"], list) or linears.keys() != own.keys():
        selecting = ("layers_to_transform", "layers_pattern", "exclude_modules")
        values |= {"target_modules": sorted(linears), **dict.fromkeys(selecting)}
    scalings = {linear.scaling for linear in linears.values()}
    rank = config["r"]
    if (
        shared is None
        and ranks == [rank]
        and rank in SERVER_RANKS
        and scalings == {_scaling(config, rank, config["lora_alpha"])}
    ):
        return PaddedAdapter(values, dict(state), own_ranks, [])
    common = Counter(linear.scaling for linear in linears.values()).most_common(1)[0][0]
    folded = {name: _folded(linear, common) for name, linear in linears.items()}
    rank, alphas = stored_alphas({linear.scaling for linear in folded.values()}, at_least=ranks[-1])
    pattern = {re.escape(name): alphas[linear.scaling] for name, linear in folded.items() if linear.scaling != common}
    values |= {"r": rank, "lora_alpha": alphas[common], "use_rslora": False, "alpha_pattern": pattern}
    notes = []
    if shared is not None:
        notes.append(f"It holds the shared expert, of rank {shared[0]['r']}, beside its own rank.")
    if shared is None or ranks != [rank]:
        before = ", ".join(map(str, ranks))
        notes.append(f"Padded with zeros from rank {before} to {rank}; the scaling is the same number.")
    if pattern:
        notes.append(
            f"{counted(len(pattern), 'linear has', 'linears have')} a different scaling, stored in alpha_pattern; a "
            "version of vLLM that does not read it would serve them wrongly without an error."
        )
    padded_state = {}
    for name, linear in folded.items():
        missing = rank - linear.down.shape[0]
        padded_state[f"{PREFIX}{name}{A}"] = torch.nn.functional.pad(linear.down, (0, 0, 0, missing))
        padded_state[f"{PREFIX}{name}{B}"] = torch.nn.functional.pad(linear.up, (0, missing))
    return PaddedAdapter(values, padded_state, own_ranks, notes)


def ranks_of(state: Mapping[str, Tensor]) -> list[int]:
    """The ranks of an adapter's linears, each once, ascending."""
    return sorted({tensor.shape[0] for name, tensor in state.items() if name.endswith(A)})


def side_by_side(first: Mapping[str, Linear], second: Mapping[str, Linear]) -> dict[str, Linear]:
    """One adapter that computes the sum of two: A is [A_1; A_2], B is [B_1 | B_2], in each linear that both have.

    Where their scalings differ, the first one's B takes the quotient, which rounds it once unless it is a power of two.
    """
    found = {**first, **second}
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        common = other.scaling or one.scaling
        ups = [item.up if item.scaling == common else item.up * (item.scaling / common) for item in (one, other)]
        found[name] = Linear(torch.cat([one.down, other.down]), torch.cat(ups, 1), common)
    return found


def linears_of(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Linear]:
    """Collect the adapted linears by module name, each with the scaling that PEFT gives it.

    Raises:
        ValueError: naming the tensors that are not a pair of A and B.
    """
    names = [key.removesuffix(A) for key in state if key.endswith(A)]
    strange = sorted(state.keys() - {name + end for name in names for end in (A, B)})
    strange += [name + A for name in names if name + B not in state]
    if strange or not names:
        raise ValueError(f"its tensors are not pairs of A and B: {', '.join(strange[:3]) or 'there are none'}")
    found = {}
    for name in names:
        module, down = name.removeprefix(PREFIX), state[name + A]
        pattern: dict[str, float] = config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), module), config["lora_alpha"])
        found[module] = Linear(down, state[name + B], _scaling(config, down.shape[0], alpha))
    return found


def _scaling(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    """Compute the scaling of one linear as PEFT does."""
    return lora_scale(alpha, rank, use_rslora=bool(config.get("use_rslora")))


def _folded(linear: Linear, common: float) -> Linear:
    """Bring a linear to the common scaling, where B can absorb the factor without rounding; else return it
    unchanged."""
    factor = linear.scaling / common if common else 0.0
    if factor == 1 or math.frexp(factor)[0] != 0.5 or common * factor != linear.scaling:
        return linear
    up = linear.up * factor
    return linear._replace(up=up, scaling=common) if torch.equal(up / factor, linear.up) else linear


def stored_alphas(scalings: set[float], *, at_least: int) -> tuple[int, dict[float, float]]:
    """Find the smallest rank of vLLM's with which every scaling is exactly alpha / rank for some alpha; also returns
    these.

    Multiplying by a power of two rounds nothing, so that a rank is always found; rank 320 cannot give every scaling.
    """
    for rank in SERVER_RANKS:
        alphas = {scaling: _alpha(scaling, rank) for scaling in scalings}
        found = {scaling: alpha for scaling, alpha in alphas.items() if alpha is not None}
        if rank >= at_least and len(found) == len(scalings):
            return rank, found
    raise ValueError(f"no rank that vLLM serves holds rank {at_least} with scalings {sorted(scalings)}")


def _alpha(scaling: float, rank: int) -> float | None:
    near = scaling * rank
    for alpha in (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if alpha / rank == scaling:
            return int(alpha) if alpha.is_integer() else alpha
    return None
