"""Continue a prompt and say which expert each token used; the command `dylora generate`."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from .base import load_tokenizer
from .data import encode_prompt, text_format
from .model import DyLoRAMoE
from .summary import Sample, show_legend, show_sample


def sample(
    model: DyLoRAMoE,
    prompt_ids: list[int],
    *,
    end_ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    label: str = "",
) -> Sample:
    """Generate from one prompt, cached; greedy where `temperature` is 0.

    Args:
        prompt_ids: token ids.
        end_ids: tokens that end the text.
        label: the sample's `domain`.
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
    return Sample(label, ids, experts, len(prompt_ids))


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that training taught as ends: of a response and of a text."""
    form = text_format(tokenizer)
    return sorted({form.response_end_id, form.text_end_id})


def run(
    *,
    checkpoint: str,
    prompt: str,
    raw: bool,
    expert: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """The command: load, generate, print in colours. Arguments as its flags."""
    if not prompt:
        raise ValueError("--prompt is empty; give a question, or with --raw a text to continue")
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"--temperature is {temperature}; it must be 0 or more")
    torch.manual_seed(seed)
    model = DyLoRAMoE.from_pretrained(checkpoint)
    tokenizer = load_tokenizer(model.base_id, revision=model.base_revision)
    form = text_format(tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if raw else encode_prompt(form, prompt)
    ids = [*form.start_ids, *ids] if raw else ids
    forced = nullcontext() if expert is None else model.route_to(None if expert == "base" else expert)
    with forced:
        generated = sample(
            model,
            ids,
            end_ids=end_ids(tokenizer),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            label="answer" if not raw else "text",
        )
    console = Console()
    show_legend(console, model.router.names)
    show_sample(console, generated, tokenizer, model.router.names)
