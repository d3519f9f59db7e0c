"""Measure what is lost where tokens are not routed one by one: the held-out losses of each way to use the same experts.

Every way is measured on the same rows, so that differences are paired. One expert a request needs no forward of its
own: the loss of a row is the one that its chosen expert has on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dylo_moe.commands.export.request_routing import experts_for
from dylo_moe.data.collator import Collator
from dylo_moe.evaluation.held_out import HeldOut
from dylo_moe.evaluation.losses import DatasetLosses, Losses, estimates, measure, shown_estimate
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import BASE, SHARED, TOKEN, UNIFORM
from dylo_moe.routing.token_masks import prompt_ends
from dylo_moe.utils.redact import short_name
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table

ROUTED = "each token routed"

PER_REQUEST = "one expert a request"

BY_BASE = "prompts read by the base"
"""Behind the name of a way, where another of that name has the prompts read by the experts."""

PLAIN = "this model"

BASE_ALONE = "the base alone"

TITLE = "nats per token on held-out rows; lost: against routing each token, with 95 % intervals"


class Measured(NamedTuple):
    """The held-out losses of several ways to use the same experts."""

    ways: dict[str, Losses]
    """The losses of each way, by the name of the way; `ROUTED` is one of them."""
    notes: list[str]
    """Sentences that a reader of the losses should know."""
    requests: dict[str, dict[str, int]]
    """The number of rows of each dataset that each member gets as requests; empty where this was not measured."""


def measure_requests(
    model: DyLoRAMoE,
    held: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    screen: Screen,
    adapts_prompts: bool = False,
) -> Measured:
    """Measure each token routed, one expert a request, every expert always, and the base alone.

    Args:
        adapts_prompts: the request's expert will read the prompt too, which the model leaves to the base; one expert a
            request is measured both ways then.
    """
    ways, notes = measure_routed(model, held, tokenizer, batch_size=batch_size, screen=screen), list(held.notes)
    by_member = {BASE: ways[BASE_ALONE]}
    has_base = model.experts.shared is not None and BASE in model.router.names
    names = [*model.experts.names, *([SHARED] if has_base else [])]
    by_base = dict(by_member)
    for name in names:
        with model.route_to(name):
            by_base[name] = measure(model, held, tokenizer, batch_size=batch_size, screen=screen, what=name)
            with prompts_adapted(model) if adapts_prompts else nullcontext():
                adapted = adapts_prompts and measure(model, held, tokenizer, batch_size=batch_size, screen=screen)
        by_member[name] = adapted or by_base[name]
    requests: dict[str, dict[str, int]] = {}
    if model.router_config.policy == UNIFORM:
        notes.append("The router's policy is 'uniform', which prefers no expert: which one to ask is up to you.")
    else:
        chosen = row_experts(model, held, tokenizer, batch_size=batch_size)
        ways[PER_REQUEST] = picked(by_member, chosen)
        if adapts_prompts:
            ways[f"{PER_REQUEST}, {BY_BASE}"] = picked(by_base, chosen)
        requests = {dataset: dict(Counter(names)) for dataset, names in chosen.items()}
    ways |= {f"{name}, always": by_member[name] for name in names}
    return Measured(ways, notes, requests)


@contextmanager
def prompts_adapted(model: DyLoRAMoE) -> Iterator[None]:
    """Inside, `route_to` sends every token to its expert, also those of a prompt that the model leaves to the base."""
    config = model.router_config
    model.router_config = model.router.config = replace(config, granularity=TOKEN, turns=None)
    try:
        yield
    finally:
        model.router_config = model.router.config = config


def measure_routed(
    model: DyLoRAMoE, held: HeldOut, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, screen: Screen
) -> dict[str, Losses]:
    """Measure the base alone, and each token routed."""
    with model.route_to(None):
        base = measure(model, held, tokenizer, batch_size=batch_size, screen=screen, what="the base")
    return {BASE_ALONE: base, ROUTED: measure(model, held, tokenizer, batch_size=batch_size, screen=screen)}


def row_experts(
    model: DyLoRAMoE, held: HeldOut, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> dict[str, list[str]]:
    """Choose the member for each row as a request, by dataset; rows without a loss are left out.

    A row's prompt ends where its response begins; the prompt of a text without a response is its first 32 tokens.
    """
    found: dict[str, list[str]] = {}
    for dataset, batch in _batches(held, tokenizer, batch_size):
        ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
        lengths = prompt_ends(mask.bool(), labels=labels)[:, 0] + 1
        names = experts_for(model, ids, mask, prompt_lengths=lengths)
        has_loss = (labels[:, 1:] != -100).any(1).tolist()
        found.setdefault(dataset, []).extend(name for name, has in zip(names, has_loss, strict=True) if has)
    return found


@torch.no_grad()
def routed_shares(
    model: DyLoRAMoE, held: HeldOut, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> dict[str, float]:
    """Measure each member's mean routing weight over the held-out tokens; datasets count equally, and shares sum to
    1."""
    sums: dict[str, torch.Tensor] = {}
    for dataset, batch in _batches(held, tokenizer, batch_size):
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        routing = model.route(inputs.pop("input_ids"), **inputs)
        total = routing.weights.double().sum((0, 1)).cpu()
        sums[dataset] = sums.get(dataset, torch.zeros_like(total)) + total
    mean = torch.stack([total / total.sum() for total in sums.values()]).mean(0)
    return {name: share for name, share in zip(model.router.names, mean.tolist(), strict=True) if share > 0}


def _batches(
    held: HeldOut, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    collator = Collator(tokenizer)
    for dataset, rows in held.rows.items():
        for start in range(0, len(rows), batch_size):
            yield dataset, collator([rows[place] for place in range(start, min(start + batch_size, len(rows)))])


def picked(by_member: Mapping[str, Losses], chosen: Mapping[str, Sequence[str]]) -> Losses:
    """Pick the loss of each row from the member that was chosen for the row."""
    found = {}
    for dataset, names in chosen.items():
        first = by_member[BASE][dataset]
        sums = [by_member[name][dataset].sums[place] for place, name in enumerate(names)]
        found[dataset] = DatasetLosses(first.documents, sums, first.tokens)
    return found


# The losses as JSON, as a table, and in words.


def losses_as_json(measured: Measured, *, seed: int) -> dict[str, Any]:
    """Write the losses, and what each way loses against routing each token, with 95 % intervals, as JSON values."""
    routed = measured.ways[ROUTED]
    return {
        "unit": "nats per token",
        "level": 0.95,
        "num_rows": {name: len(item.tokens) for name, item in routed.items()},
        "num_tokens": {name: sum(item.tokens) for name, item in routed.items()},
        "notes": measured.notes,
        "requests": measured.requests,
        "ways": {
            way: {
                "loss": estimates([losses], seed=seed).as_json(),
                "lost": estimates([losses], [routed], seed=seed).as_json(),
            }
            for way, losses in measured.ways.items()
        },
    }


def table_of(measured: Measured, *, seed: int) -> tuple[list[str], list[list[str | tuple[str, ...]]]]:
    """Write the losses as titles of columns, and a line of cells for each way; an estimate is a cell of two parts."""
    routed = measured.ways[ROUTED]
    datasets = list(routed)
    means = ["mean"] if len(datasets) > 1 else []
    head = ["way", *(short_name(name) for name in datasets), *means, "lost"]
    lines: list[list[str | tuple[str, ...]]] = []
    for way, losses in measured.ways.items():
        found, lost = estimates([losses], seed=seed), estimates([losses], [routed], seed=seed).mean
        values = [*(found.datasets[name].value for name in datasets), *(found.mean.value for _ in means)]
        cells = [f"{value:.3f}" for value in values]
        lines.append([way, *cells, "" if way == ROUTED else shown_estimate(lost, sign=True)])
    return head, lines


def show_served_losses(screen: Screen, measured: Measured, *, seed: int) -> None:
    """Print the losses as a table, and the notes."""
    head, lines = table_of(measured, seed=seed)
    table = Table(TITLE, head)
    for line in lines:
        table.add_row(*line)
    screen.say(table)
    for note in measured.notes:
        screen.note(note)


def loss_in_words(measured: Measured, way: str, *, seed: int) -> str:
    """Say in a sentence what a way loses against routing each token."""
    routed = measured.ways[ROUTED]
    lost = estimates([measured.ways[way]], [routed], seed=seed).mean
    ends = lost.interval.as_json()
    known = "not known" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"
    over = "mean over datasets, " if len(routed) > 1 else ""
    doubt = "" if lost.interval.excludes_zero else "; that may be chance"
    side = "higher" if lost.value >= 0 else "lower"
    return (
        f"Against routing each token, the loss of {way} is {abs(lost.value):.3f} nats per token {side} ({over}95 % "
        f"interval of the difference {known}){doubt}."
    )
