"""What routing costs: forward, training step and cached generation against the plain base.

    python benchmarks/speed.py [--model smollm2-135m] [--num_experts 4] [--lora_dropout 0.05] [--rounds 9]

Every variant does the same work on the same real text, in turns in one process, one thread, as CPU
time; the table gives the median ratio to the plain base of the same round, with the least and the most.
Adapters (all linears of all layers, r 16) have random non-zero B, so that nothing is skipped.
"""

from __future__ import annotations

import argparse
import inspect
import pydoc
import statistics
import textwrap
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dylo_moe import DyLoRAMoE
from dylo_moe.base import load_base, load_tokenizer

BATCH, SEQ = 2, 128
PROMPT, NEW_TOKENS = 32, 16


def lora_config(dropout: float = 0.05) -> LoraConfig:
    """The same targets, rank and dropout for every variant."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def randomise(model: nn.Module) -> nn.Module:
    """Non-zero B, so that every expert changes the result."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model


def real_text(model_name: str) -> torch.Tensor:
    """[2, 128] tokens: a row of Python source and a row of English prose, so that routing has a choice."""
    tokenizer = load_tokenizer(model_name)
    texts = [inspect.getsource(textwrap), pydoc.getdoc(argparse) * 20]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:SEQ] for text in texts]
    return torch.tensor(rows)


def build_variants(model_name: str, num_experts: int, dropout: float, ids: torch.Tensor) -> dict[str, nn.Module]:
    """The plain base, stock PEFT with one adapter, ours routed top-1, and ours dense over all."""
    peft = randomise(get_peft_model(load_base(model_name, dtype=torch.float32), lora_config(dropout)))
    variants: dict[str, nn.Module] = {
        "base": load_base(model_name, dtype=torch.float32).requires_grad_(False),
        "PEFT, 1 adapter": peft,
    }
    for label, dense in (("top-1 of", False), ("dense", True)):
        ours = DyLoRAMoE.from_base(
            load_base(model_name, dtype=torch.float32), num_experts=num_experts, lora=lora_config(dropout)
        )
        randomise(ours)
        ours.initialize_router([{"input_ids": ids.view(2 * num_experts, -1)}])
        for expert in ours.experts:
            expert.mature = not dense
        variants[f"ours, {label} {num_experts}"] = ours
    return variants


def forward(model: nn.Module, ids: torch.Tensor) -> None:
    """One forward in evaluation, logits of every token."""
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)


def training_step(model: nn.Module, ids: torch.Tensor) -> None:
    """Forward with loss and backward; the plain base differentiates its activations only."""
    model.train()
    if any(parameter.requires_grad for parameter in model.parameters()):
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)
    else:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()


def generate(model: nn.Module, ids: torch.Tensor) -> None:
    """Greedy, cached, batch 1: 16 tokens from 32."""
    model.eval()
    prompt = ids[:1, :PROMPT]
    tokens = NEW_TOKENS
    mask = torch.ones_like(prompt)
    model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def generate_batch(model: nn.Module, ids: torch.Tensor) -> None:
    """Greedy, cached, batch 8 of both kinds of text: 16 tokens from 32."""
    model.eval()
    prompt = ids[:, :PROMPT].repeat(4, 1)
    tokens = NEW_TOKENS
    mask = torch.ones_like(prompt)
    model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


WORK: dict[str, Callable[[nn.Module, torch.Tensor], None]] = {
    f"forward {BATCH}x{SEQ}": forward,
    f"training step {BATCH}x{SEQ}": training_step,
    f"generate {NEW_TOKENS} from {PROMPT}, batch 1": generate,
    f"generate {NEW_TOKENS} from {PROMPT}, batch 8": generate_batch,
}


def measure(variants: dict[str, nn.Module], work: Callable, ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round; every round runs all variants in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_index in range(rounds + 1):
        for name, model in variants.items():
            start = time.process_time()
            work(model, ids)
            if round_index > 0:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--lora_dropout", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids = real_text(arguments.model)
    variants = build_variants(arguments.model, arguments.num_experts, arguments.lora_dropout, ids)
    print(
        f"{arguments.model}, torch {torch.__version__}, one thread, "
        f"lora_dropout {arguments.lora_dropout}, {arguments.rounds} rounds"
    )
    print(f"{'':34s}" + "".join(f"{name:>26s}" for name in variants))
    for label, work in WORK.items():
        seconds = measure(variants, work, ids, arguments.rounds)
        cells = []
        for name in variants:
            ratios = [own / plain for own, plain in zip(seconds[name], seconds["base"], strict=True)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})")
        print(f"{label:34s}" + "".join(f"{cell:>26s}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
