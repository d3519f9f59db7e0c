"""Conversations of tiny tokens, and their answers found by a naive loop."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dylo_moe import DyLoRAMoE
from dylo_moe.routing.turn_tokens import TurnTokens

from .tiny import tiny_moe, tokens

TURNS = TurnTokens(opening=(90, 91, 92), adapted_from=1, endings=((93,), (94, 95)))
"""Ids that `chat` uses for nothing else: an answer is recognised at 91 behind 90."""

BY_ANSWER: dict[str, Any] = {"granularity": "response", "turns": TURNS, "router_half_life": 3.0}


def chat(*lengths: int, seed: int = 0, closed: bool = True) -> Tensor:
    """A conversation, int64 [tokens]: the lengths of a message, its answer, the next message, its answer, and so on.

    Args:
        closed: whether the last answer is closed.
    """
    parts = []
    for index, length in enumerate(lengths):
        text = tokens(length, seed=100 * seed + index, high=90)
        if index % 2:
            end = TURNS.endings[index // 2 % 2] if closed or index < len(lengths) - 1 else ()
            parts += [torch.tensor(TURNS.opening), text, torch.tensor(end, dtype=torch.int64)]
        else:
            parts.append(text)
    return torch.cat(parts)


@torch.no_grad()
def answering(base: Any = "llama", **options: Any) -> DyLoRAMoE:
    """`tiny_moe` that decides once an answer, with features scaled so that answers choose different experts."""
    model = tiny_moe(base, **{**BY_ANSWER, **options})
    features = torch.cat(model.text_features({"input_ids": chat(7, 2, seed=seed)[None]} for seed in range(40)))
    model.router.feature_mean.copy_(features.mean(0))
    model.router.feature_scale.copy_(features.shape[-1] ** -0.5 / features.std(0))
    return model


@functools.cache
def shared_answering(base: str = "llama", **options: Any) -> DyLoRAMoE:
    """`answering`, made once for all tests that only read it."""
    return answering(base, **options)


def naive_openers(ids: list[int], turns: TurnTokens = TURNS) -> list[int | None]:
    """For each token of one text, where the answer that it belongs to begins; None where it belongs to none."""
    openers: list[int | None] = []
    opener = None
    for place in range(len(ids)):
        read = tuple(ids[: place + 1])
        if read[-len(turns.recognised) :] == turns.recognised:
            opener = place
        elif any(read[-len(ending) :] == ending for ending in turns.endings):
            opener = None
        openers.append(opener)
    return openers
