"""The command `dylora generate`: continue a prompt and show which expert each token used."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from dylo_moe.base.limits import limits_of
from dylo_moe.base.loading import load_base_without_weights, load_tokenizer
from dylo_moe.data.encoding import encode_prompt, text_format
from dylo_moe.evaluation.continuation import sample
from dylo_moe.model.checkpoint import manifest_or_problem, named_base
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.terminal import show_legend, show_sample
from dylo_moe.utils.checks import COUNT, NOT_NEGATIVE, SEED, range_problems
from dylo_moe.utils.screen import Screen

RANGES = {"max_new_tokens": COUNT, "temperature": NOT_NEGATIVE, "seed": SEED}


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

    The arguments are the flags of `dylora generate`. What they and the base's config show to be wrong is refused before
    any weights are read.

    Raises:
        ValueError: for values out of range, an expert that the checkpoint does not have, or a text that the base cannot
            read; all problems that the flags show are in one message.
    """
    values = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    problems = [] if prompt else ["prompt is empty; give a question, or with --raw a text to continue"]
    problems += range_problems(values, RANGES)
    manifest = manifest_or_problem(checkpoint, problems, expert=expert)
    base, revision = named_base(checkpoint, manifest)
    tokenizer = load_tokenizer(base, revision=revision)
    form = text_format(tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if raw else encode_prompt(form, prompt)
    if raw and ids[: len(form.start_ids)] != [*form.start_ids]:  # a text may bring its own
        ids = [*form.start_ids, *ids]
    limits = limits_of(load_base_without_weights(base, dtype="auto", revision=revision))
    if problem := limits.token_problem(ids, "the prompt") or limits.continuation_problem(len(ids), max_new_tokens):
        raise ValueError(problem)
    model = DyLoRAMoE.from_pretrained(checkpoint)
    torch.manual_seed(seed)
    forced = nullcontext() if expert is None else model.route_to(None if expert == "base" else expert)
    with forced:
        generated = sample(
            model,
            ids,
            end_ids=list(form.end_ids),
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
