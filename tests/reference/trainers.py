"""Quick trainings that several tests make: by the command line, and by the Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from dylo_moe import DyLoRAMoE
from dylo_moe.training.trainer import DyLoRATrainer

from .tiny import padded, tokens


def train_flags(folder: Path, output: Path, *more: str) -> list[str]:
    """The words of a quick `dylora train` on the folder of the fixture `tiny_folder`."""
    return [
        *("--model", str(folder / "base"), "--datasets", f"{folder / 'low.jsonl'},{folder / 'high.jsonl'}"),
        *("--num_experts", "2", "--lora_r", "4", "--max_seq_length", "64", "--learning_rate", "1e-2"),
        *("--num_epochs", "3", "--per_device_train_batch_size", "8", "--logging_steps", "3", "--use_cpu", "true"),
        *("--output_dir", str(output), *more),
    ]


def trainer_for(model: DyLoRAMoE, tmp_path: Path, *, batch: int, accumulate: int) -> DyLoRATrainer:
    """A trainer of two SGD steps on eight texts of different length and two domains."""
    rows = []
    for index, length in enumerate((5, 30, 12, 3, 21, 8, 17, 40)):
        ids = tokens(length, seed=index).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "domain": index % 2})

    def collate(rows):
        ids, mask = padded([torch.tensor(row["input_ids"]) for row in rows], side="right")
        labels, _ = padded([torch.tensor(row["labels"]) for row in rows], side="right", pad=-100)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "domain": torch.tensor([row["domain"] for row in rows]),
        }

    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=2,
        learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True,
        remove_unused_columns=False, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    return DyLoRATrainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, domains=["a", "b"])
