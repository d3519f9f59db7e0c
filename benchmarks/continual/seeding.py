"""How should a new expert start, and what should it learn from?

    python benchmarks/continual/seeding.py [--skills python cpp javascript perl] [--tokens 32768] [--held_out 24]

The skills are learned in turn as `dylora stream` learns them. Each one after the first is learned by copies of the
model in the three ways that the flags offer, from the same rows in the same order:

  nearest, own    a copy of the nearest skill's expert, its own tokens alone: the default, and what the next one finds
  fresh, own      zero delta, its own tokens alone
  nearest, dense  beside all other experts, with weights that sharpen from uniform to one expert a token

Shown is the held-out loss of the skill with its expert forced, in nats per token.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from typing import Any

import torch
from continual_baselines import BATCH_ROWS, RANK, WARM_UP_STEPS, lora_config, loss_of
from skills import NUM_TOKENS, Rows, Skill, read_skill
from torch import Tensor
from transformers import PrinterCallback

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.commands.stream.arguments import StreamArguments
from dylo_moe.commands.stream.request import StageArguments
from dylo_moe.commands.stream.stage_trainer import StageTrainer
from dylo_moe.continual.config import GrowthConfig

WAYS = {
    "nearest, own": ("nearest", "own"),
    "fresh, own": ("fresh", "own"),
    "nearest, dense": ("nearest", "dense"),
}


def learn(model: DyLoRAMoE, name: str, skill: Skill, *, start_from: str, seeding: str) -> float:
    """Grow an expert, train it as a stage does, and measure it."""
    rows = skill.train
    assert model.growth is not None
    model.growth.config = GrowthConfig(start_from=start_from)
    batches = [{"input_ids": part} for part in rows.input_ids.split(16)]
    decision = model.add_skill(name, batches)
    assert decision.expert == name, decision
    stream = StreamArguments(seeding=seeding, seeding_learning_rate=2e-3, consolidation_learning_rate=2e-4)
    with tempfile.TemporaryDirectory() as folder:
        arguments = StageArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=BATCH_ROWS, learning_rate=2e-3, report_to=[],
            warmup_steps=WARM_UP_STEPS, save_strategy="no", logging_strategy="no", remove_unused_columns=False, seed=0,
        )  # fmt: skip
        trainer = StageTrainer(
            model=model, args=arguments, train_dataset=as_dataset(rows), data_collator=collate, domains=[name],
            expert=name, stream=stream, is_new=True,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.mature(name)
    with model.route_to(name):
        return loss_of(model, skill.held_out)


def as_dataset(rows: Rows) -> Any:
    """One row an item, as the Trainer wants them."""
    return [rows.take(slice(place, place + 1)) for place in range(len(rows.input_ids))]


def collate(items: list[Rows]) -> dict[str, Tensor]:
    """A batch."""
    return {name: torch.cat([getattr(item, name) for item in items]) for name in Rows._fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--skills", nargs="+", default=["python", "cpp", "javascript", "perl"])
    parser.add_argument("--tokens", type=int, default=32768, help="trained on, a skill")
    parser.add_argument("--held_out", type=int, default=24, help="held-out rows of 256 tokens, a skill")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    base = load_base(arguments.model, dtype=torch.bfloat16)
    model = DyLoRAMoE.from_base(base, lora=lora_config(RANK), allow_expert_growth=True)
    print("| learned | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for place, name in enumerate(arguments.skills):
        skill = read_skill(name, tokenizer, num_train=arguments.tokens // NUM_TOKENS, num_held_out=arguments.held_out)
        cells, first = [], model
        for start_from, seeding in list(WAYS.values())[: None if place else 1]:
            twin = copy.deepcopy(first)
            cells.append(f"{learn(twin, name, skill, start_from=start_from, seeding=seeding):.4f}")
            model = twin if len(cells) == 1 else model
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
