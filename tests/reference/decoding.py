"""Decoding that recomputes the whole text at every step, and what is held against it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dylo_moe import DyLoRAMoE
from dylo_moe.router import Routing

from .tiny import padded, tiny_moe, tokens

NEW = 10


@functools.cache
def shared(family: str = "llama", **options: Any) -> DyLoRAMoE:
    """`tiny_moe`, made once for all tests that only read it."""
    return tiny_moe(family, **options)


def prompts(*, side: str = "left") -> tuple[Tensor, Tensor]:
    """(ids, mask) of three rows of different length."""
    return padded([tokens(n, seed=n) for n in (9, 3, 6)], side=side)


def longer(mask: Tensor, ids: Tensor) -> Tensor:
    """A prompt's mask for the text that became of it."""
    return torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)


def positions(mask: Tensor) -> Tensor:
    """The position ids that `generate` gives to tokens of such a mask."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def whole(model: DyLoRAMoE, ids: Tensor, mask: Tensor, **inputs: Any) -> Any:
    """One forward over everything, without a cache."""
    return model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, **inputs)


def uncached(
    model: DyLoRAMoE,
    ids: Tensor,
    mask: Tensor,
    *,
    steps: int = NEW,
    sample: bool = False,
    end: int | None = None,
    pad: int = 0,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """The whole sequence again for every new token; returns the tokens and the last logits of each step.

    Args:
        inputs: of every step's forward, such as prompt_lengths.
    """
    logits, finished = [], torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(steps):
        last = whole(model, ids, mask, **inputs).logits[:, -1].float()
        new = torch.multinomial(last.softmax(-1), 1).squeeze(1) if sample else last.argmax(-1)
        new = torch.where(finished, pad, new)
        if end is not None:
            finished |= new == end
        ids = torch.cat([ids, new[:, None]], 1)
        mask = longer(mask, ids)
        logits.append(last)
        if finished.all():
            break
    return ids, torch.stack(logits, 1)


def generate(model: DyLoRAMoE, ids: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """`model.generate`, greedy unless said, with everything that it can return."""
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    return model.generate(input_ids=ids, attention_mask=mask, **options)


def used_per_step(model: DyLoRAMoE) -> tuple[list[Routing], Any]:
    """Records the routing of each forward of the base, as it is made; and the handle that ends it."""
    seen: list[Routing] = []
    handle = model.base.register_forward_hook(lambda module, args, output: seen.append(output.routing))
    return seen, handle


def used_by(model: DyLoRAMoE, call: Callable[[], Any]) -> tuple[Any, Tensor]:
    """What a call returns, and the routing weights that its forwards used, behind one another."""
    seen, handle = used_per_step(model)
    try:
        result = call()
    finally:
        handle.remove()
    width = seen[0].weights.shape[0]
    return result, torch.cat([routing.weights for routing in seen if routing.weights.shape[0] == width], 1)


def assert_varied(routing: Routing) -> None:
    """Several experts are used, else the routing was never put to the test."""
    spread = routing.weights[routing.mask].std(0)
    assert (spread > 0.05).sum() >= 2, f"the routing hardly varies: {spread.tolist()}"
