"""What packing saves: the same real texts, padded and packed, through the same training step.

    python benchmarks/data/packing.py [--texts 96] [--rounds 5]

SmolLM2-135M with four experts, all linears, forward and backward, one thread, CPU time, both in turns in one process.
A padded batch holds `--batch` texts in random order; a packed one as many rows as make about as many tokens. The
loss per trained token must be the same either way, and is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig

from dylo_moe import DataConfig, DyLoRAMoE
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.data.collator import Collator
from dylo_moe.data.loading import load_data
from dylo_moe.data.packing import PackedTexts
from dylo_moe.data.sources.catalog import MACHINE_TEXT

MODEL = "smollm2-135m"


class Pass(NamedTuple):
    """One pass over all texts."""

    seconds: float
    tokens: int
    """Real ones."""
    slots: int
    """With padding."""
    loss: float
    """Nats per trained token."""


def run(model: DyLoRAMoE, batches: list[dict[str, torch.Tensor]]) -> Pass:
    """Forward and backward of every batch."""
    total, trained = 0.0, 0
    started = time.process_time()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "domain"}
        out = model(**inputs)
        out.loss.backward()
        model.zero_grad(set_to_none=True)
        count = int((batch["labels"][:, 1:] != -100).sum())
        total, trained = total + float(out.lm_loss.detach()) * count, trained + count
    seconds = time.process_time() - started
    masks = [batch["attention_mask"] for batch in batches]
    return Pass(seconds, sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks), total / trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_seq_length", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(MODEL)
    config = DataConfig(datasets=list(MACHINE_TEXT), max_seq_length=arguments.max_seq_length)
    texts = load_data(config, tokenizer, seed=0).train.select(range(arguments.texts))
    packed = PackedTexts(texts, arguments.max_seq_length)
    rows = max(1, round(arguments.batch * float(np.mean(packed.lengths)) / arguments.max_seq_length))
    collator = Collator(tokenizer)
    variants = {
        f"padded, {arguments.batch} texts a batch": (texts, arguments.batch),
        f"packed, {rows} rows of {arguments.max_seq_length} a batch": (packed, rows),
    }
    batches = {
        name: [
            collator([source[i] for i in range(at, min(at + size, len(source)))]) for at in range(0, len(source), size)
        ]
        for name, (source, size) in variants.items()
    }
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    model = DyLoRAMoE.from_base(load_base(MODEL, dtype=torch.float32), num_experts=4, lora=lora).train()
    passes: dict[str, list[Pass]] = {name: [] for name in variants}
    for name in variants:
        run(model, batches[name][:1])
    for _ in range(arguments.rounds):
        for name in variants:
            passes[name].append(run(model, batches[name]))
    print(f"{len(texts)} texts, {int(packed.lengths.sum()):,} tokens, the longest {packed.lengths.max()}\n")
    print("| | batches | padding | tokens a second | ratio | loss |")
    print("|---|---|---|---|---|---|")
    first, *_ = variants
    for name, done in passes.items():
        ratios = [base.seconds / own.seconds for base, own in zip(passes[first], done, strict=True)]
        speed = statistics.median(one.tokens / one.seconds for one in done)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        padding = 1 - done[0].tokens / done[0].slots
        print(f"| {name} | {len(batches[name])} | {padding:.1%} | {speed:.0f} | {spread} | {done[0].loss:.6f} |")


if __name__ == "__main__":
    main()
