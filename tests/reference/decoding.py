"""Decoding that recomputes the whole text at every step, and what is held against it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import QuantizedLayer

from dylo_moe import DyLoRAMoE
from dylo_moe.routing.forward_context import ForwardContext
from dylo_moe.routing.router import Routing

from .tiny import padded, tiny_base, tiny_moe, tokens

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


@contextmanager
def used_per_step(model: DyLoRAMoE) -> Iterator[list[Routing]]:
    """Records the routing that each forward of the base used. Forwards that end at the router do not return, and are
    left out."""
    seen: list[Routing] = []
    ended: list[ForwardContext] = []
    end = model.context_slot.end

    def recording() -> ForwardContext:
        ended.append(end())
        return ended[-1]

    handle = model.base.register_forward_hook(lambda module, args, output: seen.append(ended[-1].routing))
    try:
        with mock.patch.object(model.context_slot, "end", recording):
            yield seen
    finally:
        handle.remove()


def used_by(model: DyLoRAMoE, call: Callable[[], Any]) -> tuple[Any, Tensor]:
    """What a call returns, and the routing weights that its forwards used, behind one another."""
    with used_per_step(model) as seen:
        result = call()
    width = seen[0].weights.shape[0]
    return result, torch.cat([routing.weights for routing in seen if routing.weights.shape[0] == width], 1)


def assert_varied(routing: Routing) -> None:
    """Several experts are used, else the routing was never put to the test."""
    spread = routing.weights[routing.mask].std(0)
    assert (spread > 0.05).sum() >= 2, f"the routing hardly varies: {spread.tolist()}"


def drafting(assistant: Any, *, count: int, schedule: str = "constant") -> dict[str, Any]:
    """Options of `generate` with which this model drafts so many tokens at a time."""
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = count, schedule
    config.assistant_confidence_threshold = 0.0
    return {"assistant_model": assistant}


def scripted(expected: Tensor) -> PreTrainedModel:
    """A plain model that drafts this text, [1, tokens], with every fourth token wrong."""
    model, script = tiny_base(seed=9), torch.cat([expected[0], tokens(40)])

    def speak(module: Any, args: Any, output: Any) -> None:
        stop = output.past_key_values.get_seq_length()
        read = torch.arange(stop - output.logits.shape[1], stop)
        said = torch.where(read % 4 == 3, (script[read + 1] + 1) % 90 + 3, script[read + 1])
        output.logits = 20.0 * F.one_hot(said, output.logits.shape[-1])[None].float()

    model.register_forward_hook(speak)
    return model


def assisted(model: DyLoRAMoE, ids: Tensor, **options: Any) -> tuple[Any, int, int]:
    """The result of assisted decoding, and how many drafted tokens were taken and how many thrown away."""
    depth, fed = model.base.config.num_hidden_layers, []

    def count(module: Any, args: Any, output: Any) -> None:
        if model.base.config.num_hidden_layers == depth:  # else it is a draft of the model itself
            fed.append(used[-1].weights.shape[1])

    with used_per_step(model) as used:
        handle = model.base.register_forward_hook(count)  # after the one that records
        out = generate(model, ids, torch.ones_like(ids), **options)
    handle.remove()
    new = out.sequences.shape[1] - ids.shape[1]
    return out, new - len(fed), sum(fed) + 1 - out.sequences.shape[1]


class TwoBitLayer(QuantizedLayer):
    """As Transformers' quantised layers, but without another package, and so coarse that the loss shows."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        low, high = tensor.amin(-1, keepdim=True), tensor.amax(-1, keepdim=True)
        return ((tensor - low) / (high - low) * 3).round(), low, high

    def _dequantize(self, quantised: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        levels, low, high = quantised
        return levels / 3 * (high - low) + low


def two_bit_cache() -> Cache:
    """A cache for a model of two layers."""
    return Cache(layers=[TwoBitLayer(residual_length=4) for _ in range(2)])
