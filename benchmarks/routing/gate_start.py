"""Does it help to start the gate at the clusters of the text, instead of small and random?

    python benchmarks/routing/gate_start.py [--steps 32] [--seeds 0 1]

Trains the quickstart's experts on the quickstart's data with both starts, same seed, same batches, and
compares held-out losses and how far the domains are told apart (the share of each domain's most used expert).
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from peft import LoraConfig
from transformers import PrinterCallback, TrainingArguments, set_seed

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.data.collator import Collator
from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
from dylo_moe.data.sources.catalog import MACHINE_TEXT
from dylo_moe.training.trainer import DyLoRATrainer

MODEL = "smollm2-135m"


def train(start: str, seed: int, steps: int) -> list[tuple[str, float, float]]:
    """(domain, held-out loss, share of its most used expert) after training."""
    set_seed(seed)
    tokenizer = load_tokenizer(MODEL)
    data = load_data(DataConfig(datasets=list(MACHINE_TEXT), max_seq_length=128, eval_subset=50), tokenizer, seed=seed)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    model = DyLoRAMoE.from_base(load_base(MODEL, dtype=torch.float32), lora=lora)
    collator = Collator(tokenizer)
    if start == "clusters":
        model.initialize_router(
            (collator([data.train[row] for row in range(first, first + 16)]) for first in range(0, 512, 16)), seed=seed
        )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=4, seed=seed,
            remove_unused_columns=False, prediction_loss_only=True, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DyLoRATrainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            data_collator=collator,
            domains=data.names,
        )
        trainer.remove_callback(PrinterCallback)
        set_seed(seed)
        trainer.train()
        trainer.evaluate()
    return [(name, reading.loss, max(reading.shares.values())) for name, reading in trainer.readings.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    print("| seed | start | " + " | ".join(MACHINE_TEXT) + " | mean loss |")
    print("|---|---|" + "---|" * (len(MACHINE_TEXT) + 1))
    for seed in arguments.seeds:
        for start in ("random", "clusters"):
            found = train(start, seed, arguments.steps)
            cells = [f"{loss:.3f} ({share:.2f})" for _, loss, share in found]
            mean = sum(loss for _, loss, _ in found) / len(found)
            print(f"| {seed} | {start} | " + " | ".join(cells) + f" | {mean:.3f} |", flush=True)


if __name__ == "__main__":
    main()
