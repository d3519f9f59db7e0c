"""Whole runs of `dylora train` on a tiny base in a folder, and what is compared of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tiny import tiny_base

WORDS = [f"w{index}" for index in range(90)]
TIMES = ("time", "runtime", "per_second", "total_flos")


CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_run_folder(folder: Path, *, words: int | None = None, is_chat: bool = False) -> Path:
    """A base with its tokenizer, and two small datasets of different words.

    Args:
        words: of each text; None: many lengths.
        is_chat: each text is a question and its answer, which the tokenizer's template writes.
    """
    roles = ["<user>", "<assistant>"] if is_chat else []
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS, *roles])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=roles, chat_template=CHAT if is_chat else None,
    )  # fmt: skip
    tiny_base("llama", eos_token_id=2).save_pretrained(folder / "base")
    wrapped.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    for name, low in (("low", 0), ("high", 45)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(60):
                length = words or int(torch.randint(8, 40, (1,), generator=generator))
                picks = (torch.randint(0, 45, (length,), generator=generator) + low).tolist()
                text = [WORDS[pick] for pick in picks]
                cut = length // 2 if is_chat else 0
                parts = {"prompt": text[:cut], "response": text[cut:]} if is_chat else {"text": text}
                file.write(json.dumps({name: " ".join(part) for name, part in parts.items()}) + "\n")
    return folder


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    """A run of three epochs of seven steps, with dropout."""
    return [
        *("--model", str(folder / "base"), "--datasets", f"{folder / 'low.jsonl'},{folder / 'high.jsonl'}"),
        *("--num_experts", "2", "--lora_r", "4", "--lora_dropout", "0.1", "--max_seq_length", "64"),
        *("--learning_rate", "1e-2", "--num_epochs", "3", "--per_device_train_batch_size", "16"),
        *("--logging_steps", "3", "--use_cpu", "true", "--output_dir", str(output), *more),
    ]


def files_of(checkpoint: Path) -> dict[str, str]:
    """sha256 of the weights of a checkpoint: experts and router."""
    paths = sorted([*checkpoint.glob("experts/*/*.safetensors"), checkpoint / "router.safetensors"])
    assert len(paths) > 1
    return {path.relative_to(checkpoint).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def trained(run: Path) -> list[dict[str, Any]]:
    """A run's metrics without what differs from time to time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["step"] > 0 and "train_runtime" not in line]
    return [{key: value for key, value in line.items() if not any(part in key for part in TIMES)} for line in lines]
