"""Our own stream, measured like what it is compared with. See continual.py."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from continual_baselines import (
    BATCH_ROWS,
    LOW_RATE,
    RANK,
    Setting,
    lora_config,
    loss_of,
    losses_of,
    token_losses,
    train,
)
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from skills import NUM_TOKENS, Rows
from torch import Tensor

from dylo_moe import DyLoRAMoE
from dylo_moe.continual.config import GROWN
from dylo_moe.model.saving import save_tensors
from dylo_moe.routing.config import BASE

SAMPLE_ROWS = 16
SPANS: dict[str, tuple[int, int | None]] = {"0-8": (0, 8), "8-32": (8, 32), "32-128": (32, 128), "128 on": (128, None)}
SWITCH_AFTER, SETTLED, READ_ON = 768, 32, 160


def mean(nats: Tensor) -> float:
    """Of the tokens that are predicted."""
    return float(nats.nanmean())


def share(parts: Sequence[Tensor]) -> float:
    """Share of True."""
    return float(torch.cat(list(parts)).float().mean())


class Stream:
    """A growing model, and what was seen while it grew.

    Args:
        setting: see `Setting`.
        seed: of every expert's start, of the batches, and of what the library draws.
        model: that grows.
        folder: where the trained experts are kept; those that are there are not trained again.
    """

    def __init__(self, setting: Setting, seed: int, model: DyLoRAMoE, folder: Path) -> None:
        self.setting, self.seed, self.model, self.folder = setting, seed, model, folder
        self.learned: dict[str, float] = {}
        """Loss of each skill just after it was learned."""
        self.decisions: dict[str, dict[str, Any]] = {}
        self.owner = {name: model.library[name].expert if model.knows(name) else BASE for name in setting.held_out()}
        """The member of the pool that each kind of text should go to."""
        self.train_seconds = self.grow_seconds = 0.0

    def learn(self, name: str) -> None:
        """The life of a skill: novelty, growth, gate row, training, maturity."""
        model, rows = self.model, self.setting.skills[name].train
        start = time.perf_counter()
        sample = [rows.take(slice(row, row + SAMPLE_ROWS)) for row in range(0, len(rows.input_ids), SAMPLE_ROWS)]
        batches = [{"input_ids": part.input_ids, "attention_mask": part.attention_mask} for part in sample]
        decision = model.add_skill(name, batches, seed=self.seed)
        if decision.expert is None:
            raise ValueError(f"nobody learns {name}: {decision}")
        self.decisions[name], self.owner[name] = decision._asdict(), decision.expert
        grown = time.perf_counter()
        rate = self.setting.high_rate if decision.action == GROWN else LOW_RATE * self.setting.high_rate
        trained = self.folder / f"{len(self.learned)}-{name}.safetensors"
        if trained.exists():  # what an expert learns does not depend on the gate, so another gate can be measured
            set_peft_model_state_dict(model, load_file(trained), adapter_name=decision.expert)
        else:
            with model.route_to(decision.expert):
                train(model, rows, high_rate=rate, seed=self.seed)
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(model.experts.state(decision.expert), trained)
        model.mature(decision.expert)
        self.grow_seconds += grown - start
        self.train_seconds += time.perf_counter() - grown
        self.learned[name] = loss_of(model, self.setting.skills[name].held_out)

    def record(self) -> dict[str, Any]:
        """Losses and routing as they are now."""
        routed = {name: token_losses(self.model, rows) for name, rows in self.setting.held_out().items()}
        forced = {name: self.forced(name, self.owner[name]) for name in self.setting.skills}
        costs = torch.cat([routed[name] - forced[name] for name in forced])
        return {
            "losses": {name: mean(nats) for name, nats in routed.items()},
            "learned": self.learned,
            "alone": {name: mean(nats) for name, nats in forced.items()},
            "costs": {span: mean(costs[:, first:last]) for span, (first, last) in SPANS.items()},
            **self.routing(),
            "decisions": self.decisions,
            "train_seconds": self.train_seconds,
            "grow_seconds": self.grow_seconds,
        }

    def routing(self) -> dict[str, Any]:
        """Shares of held-out tokens that go to their own expert, by skill, and by place over all skills."""
        accuracy: dict[str, float] = {}
        right: dict[str, list[Tensor]] = {span: [] for span in SPANS}
        for name, rows in self.setting.held_out().items():
            is_own, mask = self.is_own(rows, self.owner[name])
            accuracy[name] = float(is_own[mask].float().mean())
            for span, (first, last) in SPANS.items():
                if name in self.setting.skills:
                    right[span].append(is_own[:, first:last][mask[:, first:last]])
        return {"accuracy": accuracy, "spans": {span: share(parts) for span, parts in right.items()}}

    def forced(self, name: str, expert: str | None) -> Tensor:
        """Nats of each token of a skill's held-out text with one expert (None: the base) for every token."""
        with self.model.route_to(expert):
            return token_losses(self.model, self.setting.skills[name].held_out)

    @torch.no_grad()
    def is_own(self, rows: Rows, expert: str) -> tuple[Tensor, Tensor]:
        """Whether each token goes to `expert` before all others, and the real tokens; bool [rows, tokens]."""
        self.model.eval()
        found = []
        for first in range(0, len(rows.input_ids), BATCH_ROWS):
            batch = rows.take(slice(first, first + BATCH_ROWS))
            routing = self.model.route(batch.input_ids, batch.attention_mask)
            found.append(routing.weights.argmax(-1) == routing.names.index(expert))
        return torch.cat(found), rows.attention_mask.bool()

    def after_switch(self) -> dict[str, float]:
        """Share of the tokens that are sent right soon after a long text of another skill, over all pairs of skills,
        and of the same tokens without that text."""
        switched: list[Tensor] = []
        alone: list[Tensor] = []
        for before, after in itertools.permutations(self.setting.skills, 2):
            text = self.setting.skills[after].held_out.input_ids[:, :READ_ON]
            rows = -(-SWITCH_AFTER // NUM_TOKENS)  # of the other skill, before each text
            heads = self.setting.skills[before].held_out.input_ids.repeat(rows, 1).view(len(text), -1)
            head = heads[:, -SWITCH_AFTER:]
            for ids, found in ((torch.cat([head, text], 1), switched), (text, alone)):
                is_own, _ = self.is_own(Rows(ids, ids, torch.ones_like(ids)), self.owner[after])
                found.append(is_own[:, SETTLED - READ_ON :].flatten())
        return {"switched": share(switched), "alone": share(alone)}


def learned_stream(setting: Setting, order: Sequence[str], seed: int) -> Stream:
    """A new model after all skills of an order; it is also saved."""
    base = setting.base()
    model = DyLoRAMoE.from_base(base, lora=lora_config(RANK), allow_expert_growth=True)
    stream = Stream(setting, seed, model, setting.folder / "trained" / f"{'-'.join(order)}-{seed}")
    for name in order:
        stream.learn(name)
    model.save_pretrained(str(model_folder(setting, order, seed)))
    return stream


def model_folder(setting: Setting, order: Sequence[str], seed: int) -> Path:
    """Where the model of a run lies."""
    return setting.folder / "models" / f"ours-{'-'.join(order)}-{seed}"


def ours(setting: Setting, order: Sequence[str], seed: int) -> dict[str, Any]:
    """The skills one after another through `model.add_skill`; each new expert is trained on its own tokens."""
    stream = learned_stream(setting, order, seed)
    return stream.record() | {"after_switch": stream.after_switch()}


def saved_ours(setting: Setting, order: Sequence[str], seed: int, *, top_k: int) -> dict[str, Any]:
    """The model that `ours` saved, with more members of the pool for each token; nothing is trained."""
    base = setting.base()
    model = DyLoRAMoE.from_pretrained(str(model_folder(setting, order, seed)), base=base)
    model.router_config = model.router.config = replace(model.router.config, top_k=top_k)
    stream = Stream(setting, seed, model, setting.folder / "trained")
    return {"losses": losses_of(model, setting.held_out()), **stream.routing(), "after_switch": stream.after_switch()}


def pair(setting: Setting, order: Sequence[str], seed: int) -> dict[str, Any]:
    """Two skills alike in words: what the router loses on them, and what the wrong expert would cost."""
    stream = learned_stream(setting, order, seed)
    first, second = order
    return stream.record() | {
        "base": {name: mean(stream.forced(name, None)) for name in order},
        "other": {
            name: mean(stream.forced(name, stream.owner[wrong])) for name, wrong in ((first, second), (second, first))
        },
    }
