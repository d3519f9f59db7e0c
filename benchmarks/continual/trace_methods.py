"""What our stream over TRACE is compared with: plain PEFT, on the same rows, for as many tokens. See trace.py.

A method is a generator of stages, one for each task of an order, or a single one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from continual_baselines import RANK, lora_config, train
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from trace_judging import Judge, Stage
from trace_tasks import Task, joined, with_replay
from transformers import PreTrainedModel

from dylo_moe.base.loading import load_base

LAMBDA = 0.5
"""Weight of O-LoRA's orthogonality, as in the published runs; the second weight (of the norm) is 0 there and here."""

SCALING = 2.0
"""alpha / r of every adapter."""


@dataclass(frozen=True)
class Setting:
    """What all methods have in common."""

    model: str
    tasks: dict[str, Task]
    judge: Judge
    high_rate: float
    folder: Path
    """Where experts are kept."""
    dtype: str = "bfloat16"
    """Of the base."""

    def base(self) -> PreTrainedModel:
        """The base, as it was read from its files."""
        return load_base(self.model, dtype=self.dtype)


@dataclass(frozen=True)
class Run:
    """One method with one order and one seed; its stages are kept in a folder, so that it can go on after an end."""

    setting: Setting
    order: tuple[str, ...]
    seed: int
    folder: Path
    done: int
    """Stages that are there already."""

    def tasks(self) -> list[Task]:
        """In the run's order."""
        return [self.setting.tasks[name] for name in self.order]

    def due(self, place: int) -> list[str]:
        """Tasks whose answers are wanted after this stage: its own; after the last one all."""
        return list(self.order) if place == len(self.order) - 1 else [self.order[place]]


Method = Callable[[Run], Iterator[Stage]]


def fresh(run: Run, rank: int) -> PeftModel:
    """The base with one new adapter."""
    torch.manual_seed(run.seed)
    return get_peft_model(run.setting.base(), lora_config(rank))


def base(run: Run) -> Iterator[Stage]:
    """The model before it learned anything."""
    model = run.setting.base()
    yield {**run.setting.judge.stage(model, run.order), "train_seconds": 0.0}


def joint(run: Run) -> Iterator[Stage]:
    """One LoRA as large as all experts together, on all tasks at once."""
    model = fresh(run, RANK * len(run.order))
    start = time.perf_counter()
    rows = joined([task.train for task in run.tasks()])
    train(model, rows, high_rate=run.setting.high_rate, seed=run.seed)
    yield {"train_seconds": time.perf_counter() - start, **run.setting.judge.stage(model, run.order)}


def in_turn(run: Run, *, replay: float) -> Iterator[Stage]:
    """One LoRA trained on the tasks one after another; a share of the rows of a stage may be of earlier tasks."""
    model = fresh(run, RANK)
    for place in range(len(run.order)):
        saved = run.folder / f"{place}.safetensors"
        if place < run.done:
            if place == run.done - 1:
                set_peft_model_state_dict(model, load_file(saved))
            continue
        start = time.perf_counter()
        rows = with_replay(run.tasks(), place, replay, run.seed) if replay else run.tasks()[place].train
        train(model, rows, high_rate=run.setting.high_rate, seed=run.seed)
        seconds = time.perf_counter() - start
        save(model, saved)
        yield {"train_seconds": seconds, **run.setting.judge.stage(model, run.due(place))}


def save(model: PeftModel, path: Path, adapter: str = "default") -> None:
    """Write an adapter's weights."""
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


# O-LoRA: Wang et al. 2023, arXiv:2310.14152, eq. 6 to 8.

PAST, NEW = "past", "new"


def o_lora(run: Run) -> Iterator[Stage]:
    """A new LoRA for each task, kept orthogonal to the earlier ones, which stay; all of them add up.

        loss = lm_loss + lambda sum over linears and earlier tasks i of |A_i A_new^T|_1

    The earlier ones lie in one adapter, side by side, which gives the same sum of products.
    """
    model = None
    for place in range(len(run.order)):
        saved = run.folder / f"{place}.safetensors"
        if place >= run.done:
            model = with_past(run, place)
            start = time.perf_counter()
            rows, rate = run.tasks()[place].train, run.setting.high_rate
            train(model, rows, high_rate=rate, seed=run.seed, penalty=functools.partial(overlap, model))
            seconds = time.perf_counter() - start
            save(model, saved, NEW)
            yield {"train_seconds": seconds, **run.setting.judge.stage(model, run.due(place))}


def with_past(run: Run, place: int) -> PeftModel:
    """The base, the adapters of the first `place` tasks side by side and frozen, and a new one."""
    model = run.setting.base()
    torch.manual_seed(run.seed + place)
    peft = get_peft_model(model, lora_config(RANK), adapter_name=NEW)
    if place:
        rank = RANK * place
        config = lora_config(rank)
        peft.add_adapter(PAST, LoraConfig(**{**config.to_dict(), "r": rank, "lora_alpha": int(SCALING * rank)}))
        states = [load_file(run.folder / f"{earlier}.safetensors") for earlier in range(place)]
        joined_state = {
            name: torch.cat([state[name] for state in states], 0 if "lora_A" in name else 1) for name in states[0]
        }
        set_peft_model_state_dict(peft, joined_state, adapter_name=PAST)
        peft.base_model.set_adapter([PAST, NEW])
        for name, parameter in peft.named_parameters():
            parameter.requires_grad = f".{NEW}." in name
    return peft


def overlap(model: PeftModel) -> Tensor:
    """lambda times the absolute products of new and earlier rows of A, summed over all linears."""
    parts = [
        (module.lora_A[PAST].weight @ module.lora_A[NEW].weight.T).abs().sum()
        for module in model.modules()
        if PAST in getattr(module, "lora_A", {})
    ]
    return LAMBDA * torch.stack(parts).sum() if parts else torch.zeros(())


METHODS: dict[str, Method] = {
    "base": base,
    "in_turn": functools.partial(in_turn, replay=0.0),
    "replay_1": functools.partial(in_turn, replay=0.01),
    "replay_5": functools.partial(in_turn, replay=0.05),
    "o_lora": o_lora,
    "joint": joint,
}
