"""The command `dylora generate`: continue a prompt and show which expert each token used."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from dylo_moe.base.limits import limits_of
from dylo_moe.base.loading import load_tokenizer
from dylo_moe.data.encoding import encode_prompt, text_format
from dylo_moe.evaluation.continuation import end_ids, sample
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.terminal import show_legend, show_sample
from dylo_moe.utils.screen import Screen


def generate(
    *,
    checkpoint: str,
    prompt: str,
    raw: bool,
    expert: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Load a checkpoint, continue a prompt, and print the text in the colours of its experts.

    The arguments are the flags of `dylora generate`.
    """
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
    limits = limits_of(model.base)
    if problem := limits.token_problem(ids, "the prompt") or limits.continuation_problem(len(ids), max_new_tokens):
        raise ValueError(problem)
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
    screen = Screen("generate")
    if screen.is_quiet:
        screen.answer(str(tokenizer.decode(generated.ids[generated.prompt_length :], skip_special_tokens=True)))
        return
    show_legend(screen, model.router.names)
    show_sample(screen, generated, tokenizer, model.router.names)
