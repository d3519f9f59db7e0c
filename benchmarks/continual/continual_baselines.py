"""What a stream of skills is compared with: plain PEFT, on the same rows, for the same number of tokens.

Each function trains one thing and returns a record for `continual.py`: losses in nats per token of held-out rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from skills import Rows, Skill
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dylo_moe.base.loading import load_base
from dylo_moe.data.encoding import IGNORED

BATCH_ROWS = 4
RANK = 8
WARM_UP_STEPS = 3
SEEDING_SHARE = 0.7
"""Share of an expert's steps at the high rate."""

LOW_RATE = 0.1
"""The low rate, as a share of the high one."""


@dataclass(frozen=True)
class Setting:
    """What all methods have in common."""

    model: str
    skills: dict[str, Skill]
    """All skills of the stream, in no order."""
    unlearned: dict[str, Skill]
    """Text that nobody trains on."""
    high_rate: float
    folder: Path
    """Where the experts of the oracle lie, for Arrow."""
    dtype: str = "bfloat16"
    """Of the base."""

    def base(self) -> PreTrainedModel:
        """The base, as it was read from its files."""
        return load_base(self.model, dtype=self.dtype)

    def held_out(self) -> dict[str, Rows]:
        """The rows that every method is judged by."""
        return {name: skill.held_out for name, skill in (self.skills | self.unlearned).items()}


def two_phase(step: int, num_steps: int) -> float:
    """The rate of a step, as a share of the high rate: a short warm-up, the high rate, then the low one."""
    if step < WARM_UP_STEPS:
        return (step + 1) / (WARM_UP_STEPS + 1)
    return 1.0 if step < SEEDING_SHARE * num_steps else LOW_RATE


def batches(rows: Rows, seed: int) -> list[Rows]:
    """All rows once, in an order of `seed`, without columns that are padding only."""
    order = torch.randperm(len(rows.input_ids), generator=torch.Generator().manual_seed(seed))
    return [trimmed(rows.take(part)) for part in order.split(BATCH_ROWS)]


def trimmed(rows: Rows) -> Rows:
    """Less the columns in which all rows are padding."""
    longest = int(rows.attention_mask.sum(1).max())
    return Rows(*(tensor[:, :longest] for tensor in rows))


def train(
    model: nn.Module, rows: Rows, *, high_rate: float, seed: int, penalty: Callable[[], Tensor] | None = None
) -> None:
    """One pass over the rows with what is trainable in `model`; a new optimizer, gradients cut at norm 1.

    Args:
        penalty: is added to the loss of every step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=high_rate, weight_decay=0.0)
    parts = batches(rows, seed)
    model.train()
    for step, batch in enumerate(parts):
        for group in optimizer.param_groups:
            group["lr"] = high_rate * two_phase(step, len(parts))
        loss = model(**batch._asdict(), use_cache=False).loss
        (loss if penalty is None else loss + penalty()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def token_losses(model: nn.Module, rows: Rows) -> Tensor:
    """Nats of each predicted token, at the token that predicts it: fp32 [rows, tokens - 1], NaN where none is."""
    model.eval()
    parts = []
    for first in range(0, len(rows.input_ids), BATCH_ROWS):
        batch = rows.take(slice(first, first + BATCH_ROWS))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        labels = batch.labels[:, 1:]
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
        parts.append(nats.view(labels.shape).masked_fill(labels == IGNORED, torch.nan))
    return torch.cat(parts)


@torch.no_grad()
def loss_of(model: nn.Module, rows: Rows) -> float:
    """Nats per predicted token, over all rows."""
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(rows.input_ids), BATCH_ROWS):
        batch = trimmed(rows.take(slice(first, first + BATCH_ROWS)))
        predicted = int((batch.labels[:, 1:] != -100).sum())
        total += float(lm_loss(model(**batch._asdict(), use_cache=False))) * predicted
        count += predicted
    return total / count


def lm_loss(output: Any) -> Tensor:
    """The language-model loss alone; a routed model adds its router's."""
    return output.loss if output.get("lm_loss") is None else output.lm_loss


def losses_of(model: nn.Module, held_out: dict[str, Rows]) -> dict[str, float]:
    """`loss_of` each kind of text."""
    return {name: loss_of(model, rows) for name, rows in held_out.items()}


def lora_config(rank: int) -> LoraConfig:
    """An adapter on all linears; its scaling is 2, whatever its rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def fresh_lora(setting: Setting, *, rank: int, seed: int) -> PeftModel:
    """The base with one new adapter."""
    torch.manual_seed(seed)
    return get_peft_model(setting.base(), lora_config(rank))


# The methods


def base(setting: Setting, order: Sequence[str], seed: int) -> dict[str, Any]:
    """The model before it learned anything."""
    return {"losses": losses_of(setting.base(), setting.held_out())}


def in_turn(setting: Setting, order: Sequence[str], seed: int) -> dict[str, Any]:
    """One LoRA trained on the skills one after another."""
    model = fresh_lora(setting, rank=RANK, seed=seed)
    learned, seconds = {}, 0.0
    for name in order:
        start = time.perf_counter()
        train(model, setting.skills[name].train, high_rate=setting.high_rate, seed=seed)
        seconds += time.perf_counter() - start
        learned[name] = loss_of(model, setting.skills[name].held_out)
    return {"losses": losses_of(model, setting.held_out()), "learned": learned, "train_seconds": seconds}


def mixture(setting: Setting, order: Sequence[str], seed: int) -> dict[str, Any]:
    """One LoRA as large as all experts together, trained on all skills at once."""
    model = fresh_lora(setting, rank=RANK * len(setting.skills), seed=seed)
    trained = [skill.train for skill in setting.skills.values()]
    rows = Rows(*(torch.cat(tensors) for tensors in zip(*trained, strict=True)))
    start = time.perf_counter()
    train(model, rows, high_rate=setting.high_rate, seed=seed)
    seconds = time.perf_counter() - start
    return {"losses": losses_of(model, setting.held_out()), "train_seconds": seconds}


def oracle(setting: Setting, order: Sequence[str], seed: int) -> dict[str, Any]:
    """One LoRA for each skill, and somebody who knows which one a text needs; other text gets the base."""
    losses: dict[str, float] = {}
    start = time.perf_counter()
    for name, skill in setting.skills.items():
        folder = expert_folder(setting, name, seed)
        if not (folder / "loss.json").exists():  # a run that was interrupted goes on
            model = fresh_lora(setting, rank=RANK, seed=seed)
            train(model, skill.train, high_rate=setting.high_rate, seed=seed)
            model.save_pretrained(str(folder))
            (folder / "loss.json").write_text(json.dumps(loss_of(model, skill.held_out)))
        losses[name] = json.loads((folder / "loss.json").read_text())
    seconds = time.perf_counter() - start
    unlearned = {name: skill.held_out for name, skill in setting.unlearned.items()}
    losses |= losses_of(setting.base(), unlearned)
    return {"losses": losses, "train_seconds": seconds}


def expert_folder(setting: Setting, name: str, seed: int) -> Path:
    """Where the oracle keeps its expert of a skill."""
    return setting.folder / "experts" / f"seed{seed}" / name


def arrow(setting: Setting, order: Sequence[str], seed: int, *, top_k: int) -> dict[str, Any]:
    """PEFT's Arrow (Ostapenko et al. 2024, arXiv:2405.11157) over the oracle's experts: routing in every linear,
    by the direction that each expert stretches most; nothing is trained for it."""
    folders = [str(expert_folder(setting, name, seed)) for name in setting.skills]
    base = setting.base()
    model = create_arrow_model(base, folders, ArrowConfig(top_k=min(top_k, len(folders)), rng_seed=seed))
    return {"losses": losses_of(model, setting.held_out())}
