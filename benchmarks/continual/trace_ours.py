"""Our stream over TRACE, the oracle and Any-SSR's router on the same experts. See trace.py.

What an expert learns does not depend on the gate, nor, as experts begin fresh here, on the order of the tasks: it is
trained once for each task and seed and kept in a file, and so is what each expert answers to each test row.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from continual_baselines import RANK, lora_config, train
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from trace_judging import Stage, answers, per_token, row_losses
from trace_methods import Method, Run
from trace_tasks import NEW_TOKENS, Task
from transformers import PreTrainedModel

from dylo_moe import DyLoRAMoE
from dylo_moe.continual.config import FRESH, FROZEN, GROW, LIBRARY, GrowthConfig
from dylo_moe.model.saving import save_tensors
from dylo_moe.routing.config import BASE, RESPONSE, SEQUENCE, TOKEN, GrowingRouterConfig
from dylo_moe.utils.atomic_files import write_whole

SAMPLE_ROWS = 16
"""Rows of a batch that the library reads."""

MIXED = "(mixed)"
"""Stands for a row that the router sends to more than one member of the pool."""

Decisions = list[str]
"""The member of the pool that each row is sent to."""


def grown(
    run: Run, router: GrowingRouterConfig, *, gate_rows: str = LIBRARY
) -> Iterator[tuple[DyLoRAMoE, dict[str, Any]]]:
    """The model after each task of the order, and what was decided; `known_skill=GROW` gives every task an expert."""
    base = run.setting.base()
    model = DyLoRAMoE.from_base(
        base,
        lora=lora_config(RANK),
        router=router,
        allow_expert_growth=True,
        growth=GrowthConfig(start_from=FRESH, known_skill=GROW, gate_rows=gate_rows),
    )
    for task in run.tasks():
        start = time.perf_counter()
        rows = range(0, len(task.train.input_ids), SAMPLE_ROWS)
        batches = [task.train.take(slice(row, row + SAMPLE_ROWS))._asdict() for row in rows]
        decision = model.add_skill(task.name, batches, seed=run.seed)
        grow_seconds = time.perf_counter() - start
        train_seconds = learn(run, model, task)
        model.mature(task.name)
        yield (
            model,
            {
                "decision": decision._asdict(),
                "grow_seconds": round(grow_seconds, 1),
                "train_seconds": train_seconds,
            },
        )


def expert_folder(run: Run, granularity: str) -> Path:
    """The folder of the experts of one seed. Those that only write answers learn other weights than those that also
    read prompts."""
    folder = run.setting.folder / "experts" / f"seed{run.seed}"
    return folder / RESPONSE if granularity == RESPONSE else folder


def learn(run: Run, model: DyLoRAMoE, task: Task) -> float:
    """Train a task's expert, or read it from its file; the seconds that its training took."""
    folder = expert_folder(run, model.router_config.granularity)
    weights, facts = folder / f"{task.name}.safetensors", folder / f"{task.name}.json"
    if facts.exists():
        set_peft_model_state_dict(model, load_file(weights), adapter_name=task.name)
        return json.loads(facts.read_text())["train_seconds"]
    start = time.perf_counter()
    with model.route_to(task.name):
        train(model, task.train, high_rate=run.setting.high_rate, seed=run.seed)
    seconds = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(model.experts.state(task.name), weights)
    write_whole(facts, json.dumps({"train_seconds": seconds}).encode())
    print(f"expert {task.name} seed {run.seed}: {seconds:.0f} s", flush=True)
    return seconds


# What each expert makes of each row.


class Forced:
    """Answers and losses of rows with one member of the pool forced; each is computed once and kept in a file.

    Args:
        run: of any method on these experts.
        granularity: whose experts they are.
    """

    def __init__(self, run: Run, granularity: str = TOKEN) -> None:
        self.judge = run.setting.judge
        self.path = expert_folder(run, granularity) / "forced.json"
        self.known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def outputs(self, model: DyLoRAMoE, name: str, sent: Decisions) -> list[str]:
        """The answers to a task's prompts, each by the member that it is sent to."""
        prompts = self.judge.tasks[name].prompts

        def compute(rows: list[int], experts: list[str | None] | None) -> list[str]:
            chosen = [prompts[row] for row in rows]
            return answers(model, self.judge.tokenizer, chosen, NEW_TOKENS[name], experts=experts)

        return self._all("outputs", name, sent, compute)

    def loss(self, model: DyLoRAMoE, name: str, sent: Decisions) -> float:
        """Nats per answer token of a task, each row with the member that it is sent to."""
        rows_of = self.judge.matrix_rows(name)

        def compute(rows: list[int], experts: list[str | None] | None) -> list[float]:
            return row_losses(model, rows_of.take(torch.tensor(rows)), experts=experts)

        return per_token(self._all("losses", name, sent, compute), self.judge.tasks[name])

    def _all(self, kind: str, name: str, sent: Decisions, compute: Any) -> list[Any]:
        """One value a row; those that are missing are computed and, unless the row is mixed, kept."""
        kept = self.known.setdefault(kind, {}).setdefault(name, {})
        found = {row: kept[f"{row} {member}"] for row, member in enumerate(sent) if f"{row} {member}" in kept}
        mixed = [row for row, member in enumerate(sent) if member == MIXED]
        pure = [row for row in range(len(sent)) if row not in found and row not in mixed]
        if mixed:
            found |= dict(zip(mixed, compute(mixed, None), strict=True))
        if pure:
            experts = [None if sent[row] == BASE else sent[row] for row in pure]
            values = dict(zip(pure, compute(pure, experts), strict=True))
            found |= values
            kept |= {f"{row} {sent[row]}": value for row, value in values.items()}
            write_whole(self.path, json.dumps(self.known).encode())
        return [found[row] for row in range(len(sent))]

    def stage(
        self, model: DyLoRAMoE, due: Sequence[str], asked: dict[str, Decisions], read: dict[str, Decisions]
    ) -> Stage:
        """Like `Judge.stage`, by decisions about whole rows: on prompts alone, and on rows with their answers."""
        outputs = {name: self.outputs(model, name, asked[name]) for name in due}
        return {
            "points": {name: self.judge.points(name, found) for name, found in outputs.items()},
            "losses": {name: self.loss(model, name, sent) for name, sent in read.items()},
            "outputs": outputs,
        }


def oracle(run: Run, *, granularity: str = TOKEN) -> Iterator[Stage]:
    """One LoRA for each task, and somebody who knows which task a text is of."""
    forced = Forced(run, granularity)
    facts: dict[str, Any] = {}
    for model, facts in grown(run, GrowingRouterConfig(granularity=granularity)):  # noqa: B007
        pass
    own = {name: [name] * len(task.prompts) for name, task in run.setting.tasks.items()}
    read = {name: sent[: run.setting.judge.num_matrix_rows] for name, sent in own.items()}
    yield {**facts, **forced.stage(model, run.order, own, read)}


# Our router.


def ours_token(run: Run, *, top_k: int | None = None, gate_rows: str = LIBRARY) -> Iterator[Stage]:
    """Each token is routed on its own, in prompts and answers, also while the answer is generated."""
    router = GrowingRouterConfig(**({} if top_k is None else {"top_k": top_k}))
    for place, (model, facts) in enumerate(grown(run, router, gate_rows=gate_rows)):
        if place >= run.done:
            yield {**facts, **run.setting.judge.stage(model, run.due(place)), "shares": shares(run, model, place)}


def ours_by_prompt(
    run: Run, *, granularity: str, top_k: int | None = None, gate_rows: str = LIBRARY
) -> Iterator[Stage]:
    """The prompt decides: with "sequence" for the whole row, with "response" for its answer, and the base reads it."""
    forced, chosen = Forced(run, granularity), {} if top_k is None else {"top_k": top_k}
    router = GrowingRouterConfig(granularity=granularity, **chosen)
    for place, (model, facts) in enumerate(grown(run, router, gate_rows=gate_rows)):
        if place < run.done:
            continue
        asked = {name: decided(model, run.setting.tasks[name].prompts) for name in run.due(place)}
        read = {name: decided(model, matrix_prompts(run, name)) for name in run.order}
        stage = forced.stage(model, run.due(place), asked, read)
        yield {**facts, **stage, "shares": shares(run, model, place)}


def matrix_prompts(run: Run, name: str) -> list[list[int]]:
    """The prompts of the rows that losses are measured on, cut as these rows are."""
    rows = run.setting.judge.matrix_rows(name)
    starts = (rows.labels != -100).int().argmax(1).tolist()
    return [ids[:start].tolist() for ids, start in zip(rows.input_ids, starts, strict=True)]


def decided(model: DyLoRAMoE, prompts: Sequence[Sequence[int]]) -> Decisions:
    """The member of the pool that each prompt's row is sent to."""
    model.eval()
    sent = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        by_text = model.router_config.per_sequence
        lengths = {"prompt_lengths": torch.tensor([len(prompt)])} if by_text else {}
        routing = model.route(ids, torch.ones_like(ids), **lengths)
        weights = routing.weights[0, -1]
        sent.append(routing.names[int(weights.argmax())] if float(weights.max()) == 1.0 else MIXED)
    return sent


def shares(run: Run, model: DyLoRAMoE, place: int) -> dict[str, dict[str, float]]:
    """Of each task learned so far, the share of its test rows' tokens that go to its own expert before all others."""
    model.eval()
    found = {}
    for name in run.order[: place + 1]:
        rows = run.setting.tasks[name].test
        is_own, is_routed = [], []
        for first in range(0, len(rows.input_ids), SAMPLE_ROWS):
            part = rows.take(slice(first, first + SAMPLE_ROWS))
            routing = model.route(part.input_ids, part.attention_mask, labels=part.labels)
            is_own.append(routing.weights.argmax(-1) == routing.names.index(name))
            is_routed.append(routing.mask)
        own, routed = torch.cat(is_own), torch.cat(is_routed)
        is_answer = (rows.labels != -100) & routed
        lasts = is_answer.int().argmax(1) - 1
        found[name] = {
            "answers": float(own[is_answer].float().mean()),
            "last prompt token": float(own.gather(1, lasts[:, None]).float().mean()),
            "all tokens": float(own[routed].float().mean()),
        }
    return found


# Any-SSR: arXiv:2503.13575.

NUM_LAYERS, NUM_FEATURES, RIDGE = 4, 2048, 100.0
"""Layers that the router reads through and the ridge are those of the published code; it widens to 10,000 features
(for 4,096 hidden ones, here 576)."""


class RidgeRouter:
    """Any-SSR's router: ridge regression of the task on random features of a prompt, W = (F'F + ridge I)^-1 F'Y.

    Features are the mean over a prompt's tokens of the hidden states after the base's first layers, widened at random
    and rectified. F'F and F'Y are sums over rows, so a new task adds to them and no earlier text is needed; the
    published recursion for the inverse gives the same W.
    """

    def __init__(self, base: PreTrainedModel, seed: int) -> None:
        self.base = base
        self.base.model.layers = self.base.model.layers[:NUM_LAYERS]
        torch.manual_seed(seed)
        self.widen = nn.Linear(self.base.config.hidden_size, NUM_FEATURES)
        self.gram = RIDGE * torch.eye(NUM_FEATURES, dtype=torch.float64)
        self.products: list[Tensor] = []
        self.names: list[str] = []

    @torch.no_grad()
    def features(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """fp64 [prompts, features]."""
        means = [
            self.base.model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0].float().mean(0)
            for prompt in prompts
        ]
        return F.relu(self.widen(torch.stack(means))).double()

    def learn(self, name: str, prompts: Sequence[Sequence[int]]) -> None:
        """Add a task."""
        found = self.features(prompts)
        self.gram += found.T @ found
        self.products.append(found.sum(0))
        self.names.append(name)

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Decisions:
        """The task of each prompt."""
        weights = torch.linalg.solve(self.gram, torch.stack(self.products, 1))
        return [self.names[place] for place in (self.features(prompts) @ weights).argmax(1).tolist()]


def any_ssr(run: Run) -> Iterator[Stage]:
    """Any-SSR's router, decided on the prompt, over our experts."""
    forced, router = Forced(run), RidgeRouter(run.setting.base(), run.seed)
    for place, (model, facts) in enumerate(grown(run, GrowingRouterConfig())):
        name = run.order[place]
        rows = run.setting.tasks[name].train
        starts = (rows.labels != -100).int().argmax(1).tolist()
        start = time.perf_counter()
        router.learn(name, [ids[:stop].tolist() for ids, stop in zip(rows.input_ids, starts, strict=True)])
        facts = {"train_seconds": facts["train_seconds"], "grow_seconds": round(time.perf_counter() - start, 1)}
        if place < run.done:
            continue
        asked = {known: router(run.setting.tasks[known].prompts) for known in run.order[: place + 1]}
        read = {known: router(matrix_prompts(run, known)) for known in run.order}
        right = {
            known: {"last prompt token": sum(member == known for member in sent) / len(sent)}
            for known, sent in asked.items()
        }
        yield {**facts, **forced.stage(model, run.due(place), asked, read), "shares": right}


OURS: dict[str, Method] = {
    "oracle": oracle,
    "ours_token": ours_token,
    "oracle_response": functools.partial(oracle, granularity=RESPONSE),
    "ours_sequence": functools.partial(ours_by_prompt, granularity=SEQUENCE),
    "ours_response": functools.partial(ours_by_prompt, granularity=RESPONSE),
    "top1_token": functools.partial(ours_token, top_k=1),
    "frozen_token": functools.partial(ours_token, top_k=1, gate_rows=FROZEN),
    "frozen_sequence": functools.partial(ours_by_prompt, granularity=SEQUENCE, top_k=1, gate_rows=FROZEN),
    "any_ssr": any_ssr,
}
