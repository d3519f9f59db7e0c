"""The model of a training run: the base, its experts, and the router's start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from dylo_moe.base.loading import four_bit, load_base, load_tokenizer
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.data.collator import Collator
from dylo_moe.data.loading import LoadedData
from dylo_moe.data.turn_tokens import find_turn_tokens
from dylo_moe.experts.adapter import lora_config
from dylo_moe.experts.config import ExpertConfig
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import RouterConfig
from dylo_moe.training.arguments import ModelArguments
from dylo_moe.utils.words import counted

ROUTER_START_ROWS = 512
"""Training rows whose features start the gate."""

ROUTER_START_BATCH = 16


def build_model(
    flags: ModelArguments,
    experts: ExpertConfig,
    router: RouterConfig,
    *,
    bf16: bool,
    growth: GrowthConfig | None = None,
    load: Callable[..., PreTrainedModel] = load_base,
) -> DyLoRAMoE:
    """The base with fresh experts and router; every problem of the flags that depends on the base is raised here.

    Args:
        bf16: whether the base is loaded in bfloat16.
        growth: for a pool that begins empty and grows, whatever the number of `experts`.
        load: makes the base, as `load_base` does.
    """
    if router.reads_final and not router.per_sequence:
        raise ValueError("router_layer final with granularity token cannot generate; add --granularity sequence")
    if router.per_response and router.turns is None:
        tokenizer = load_tokenizer(flags.model, accept_terms=flags.accept_gemma_terms)
        router = replace(router, turns=find_turn_tokens(tokenizer))
    return DyLoRAMoE.from_base(
        load(flags.model, **base_options(flags, bf16=bf16)),
        num_experts=experts.num_experts if growth is None else None,
        lora=lora_config(experts),
        shared_rank=experts.shared_r,
        shared_alpha=experts.shared_alpha,
        router=router,
        allow_expert_growth=growth is not None,
        growth=growth,
        balance_coefficient=flags.balance_coefficient,
    )


def base_options(flags: ModelArguments, *, bf16: bool) -> dict[str, Any]:
    """How a base is loaded, as `load_base` takes it."""
    attention = {"attn_implementation": flags.attn_implementation} if flags.attn_implementation else {}
    bits = {"quantization_config": four_bit(torch.bfloat16 if bf16 else torch.float32)} if flags.load_in_4bit else {}
    terms = {"accept_terms": True} if flags.accept_gemma_terms else {}
    return {"dtype": torch.bfloat16 if bf16 else "auto", **attention, **bits, **terms}


def check_start(model: DyLoRAMoE, data: LoadedData) -> None:
    """Raise ValueError where there are fewer training rows than experts, from which the gate cannot start."""
    if len(data.train) < len(model.experts):
        raise ValueError(
            f"the datasets have {counted(len(data.train), 'training row')}, too few for {len(model.experts)} experts, "
            "whose gate starts from one row for each: give more rows, or a smaller --num_experts"
        )


def start_router(model: DyLoRAMoE, data: LoadedData, collator: Collator, *, seed: int) -> None:
    """Start the gate from the first training rows."""
    num_rows = min(ROUTER_START_ROWS, len(data.train))
    batches = (
        collator([data.train[row] for row in range(start, min(start + ROUTER_START_BATCH, num_rows))])
        for start in range(0, num_rows, ROUTER_START_BATCH)
    )
    model.initialize_router(batches, seed=seed)
