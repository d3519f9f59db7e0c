"""Generate one continuation of a prompt, with the expert that processed each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.encoding import text_format
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.turns import Turn


def sample(
    model: DyLoRAMoE,
    prompt_ids: list[int],
    *,
    end_ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    label: str = "",
) -> RoutedText:
    """Generate from one prompt with a cache; greedily if `temperature` is 0.

    Args:
        prompt_ids: the token ids of the prompt.
        end_ids: the tokens that end the text.
        label: the `domain` of the returned sample.
    """
    inputs = torch.tensor([prompt_ids], device=model.device)
    options = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],
        return_dict_in_generate=True,
        **options,
    )
    ids = output.sequences[0].tolist()
    routing = output.routing
    best = routing.weights[0].max(-1)
    experts = [
        routing.names[index] if weight > 0 else None
        for index, weight in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    written = getattr(output, "turns", None)
    return RoutedText(label, ids, experts, len(prompt_ids), None if written is None else written[0])


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response, a call of a tool or a text in training."""
    return list(text_format(tokenizer).end_ids)


class RoutedText(NamedTuple):
    """A generated text and the expert of each of its tokens (None: the base alone)."""

    domain: str
    ids: list[int]
    experts: list[str | None]
    prompt_length: int
    turns: list[Turn] | None = None
    """With response granularity, its answers in their order; None with another."""
