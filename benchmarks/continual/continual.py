"""Skills learned one after another: what is kept, what is forgotten, and what the alternatives make of it.

    python benchmarks/continual/continual.py --output FOLDER [--only METHOD ...] [--tokens 32768] [--orders 2]
        [--seeds 0 1]

All methods see the same rows for the same number of tokens, and are judged by the same held-out rows:

  base       the model before it learned anything
  in_turn    one LoRA trained on the skills in turn
  mixture    one LoRA of the size of all experts together, trained on all skills at once
  oracle     one LoRA for each skill, the right one chosen by somebody who knows: the ceiling
  arrow      PEFT's Arrow over the oracle's experts, with its own default of three experts a token
  arrow_top1 the same with one expert a token
  ours       `model.add_skill`, then each new expert trained on its own tokens, as `dylora stream` does
  ours_top1  the same models with one member of the pool for each token
  pair       two skills alike in words and different in meaning, through ours: what confusing them costs

Each run (method, order, seed) leaves a file in the output folder and is not done again, so the command can be
interrupted and run again. All of it takes about 70 minutes on two cores that nothing else uses. In the end it prints
the tables of all files there and writes summary.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import continual_baselines as baselines
from continual_ours import ours, pair, saved_ours
from continual_tables import Comparison, pair_table
from skills import LANGUAGES, NUM_TOKENS, PAIR, Skill, read_skill

from dylo_moe.base.loading import load_tokenizer

Method = Callable[[baselines.Setting, Sequence[str], int], dict[str, Any]]

METHODS: dict[str, Method] = {
    "base": baselines.base,
    "oracle": baselines.oracle,
    "in_turn": baselines.in_turn,
    "mixture": baselines.mixture,
    "arrow": functools.partial(baselines.arrow, top_k=3),
    "arrow_top1": functools.partial(baselines.arrow, top_k=1),
    "ours": ours,
    "ours_top1": functools.partial(saved_ours, top_k=1),
    "pair": pair,
}
ORDER_MATTERS = {"in_turn", "ours", "ours_top1"}


def orders_of(skills: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """As given, reversed, and then shuffled ones."""
    orders = [tuple(skills), tuple(reversed(skills))]
    generator = random.Random(0)
    while len(orders) < count:
        order = tuple(generator.sample(skills, len(skills)))
        if order not in orders:
            orders.append(order)
    return orders[:count]


def runs_of(method: str, arguments: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], int]]:
    """The (order, seed) that a method is run with; only what can make a difference."""
    skills = PAIR if method == "pair" else arguments.skills
    orders = orders_of(skills, arguments.orders) if method in ORDER_MATTERS else [tuple(skills)]
    for seed in arguments.seeds[:1] if method == "base" else arguments.seeds:
        yield from ((order, seed) for order in orders)


def run(method: str, order: tuple[str, ...], seed: int, setting: baselines.Setting, settings: dict[str, Any]) -> None:
    """One run, unless its file is there."""
    path = setting.folder / "runs" / f"{method}-{'-'.join(order)}-{seed}.json"
    if path.exists():
        if json.loads(path.read_text())["settings"] != settings:
            raise SystemExit(f"{path} was made with other settings; choose another --output or delete it")
        return
    start = time.perf_counter()
    record = {"method": method, "order": order, "seed": seed, "settings": settings}
    record |= METHODS[method](setting, order, seed)
    record["seconds"] = round(time.perf_counter() - start, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(record, indent=2))
    aside.rename(path)
    print(f"{path.name}: {record['seconds']} s", flush=True)


def read_skills(names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Skill]:
    """The texts of these skills, as many as the arguments say."""
    tokenizer = load_tokenizer(arguments.model)
    num_train = arguments.tokens // NUM_TOKENS
    return {name: read_skill(name, tokenizer, num_train=num_train, num_held_out=arguments.held_out) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--skills", nargs="+", default=list(LANGUAGES))
    parser.add_argument("--unlearned", nargs="+", default=["english"], help="text that nobody trains on")
    parser.add_argument("--tokens", type=int, default=32768, help="trained on, a skill")
    parser.add_argument("--held_out", type=int, default=24, help="held-out rows of 256 tokens, a skill")
    parser.add_argument("--orders", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="the high one of the two")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    arguments = parser.parse_args()
    names = ("model", "skills", "tokens", "held_out", "learning_rate", "dtype")
    settings = {name: getattr(arguments, name) for name in names}
    setting = baselines.Setting(
        model=arguments.model,
        skills=read_skills(arguments.skills, arguments),
        unlearned=read_skills(arguments.unlearned, arguments),
        high_rate=arguments.learning_rate,
        folder=arguments.output,
        dtype=arguments.dtype,
    )
    for method in arguments.only:
        if method == "pair":
            setting = replace(setting, skills=read_skills(PAIR, arguments))
        for order, seed in runs_of(method, arguments):
            run(method, order, seed, setting, settings)
    show(arguments)


def show(arguments: argparse.Namespace) -> None:
    """The tables of all runs that are there."""
    records = [json.loads(path.read_text()) for path in sorted((arguments.output / "runs").glob("*.json"))]
    pairs = [record for record in records if record["method"] == "pair"]
    stream = [record for record in records if record["method"] != "pair"]
    stream.sort(key=lambda record: list(METHODS).index(record["method"]))
    summary = {}
    if any(record["method"] == "base" for record in stream):
        comparison = Comparison(stream, arguments.skills, arguments.unlearned)
        comparison.print()
        summary = comparison.summary()
    if pairs:
        print("\nTwo skills alike in words and different in meaning, nats per token:\n\n" + pair_table(pairs))
    (arguments.output / "summary.json").write_text(json.dumps({"methods": summary, "runs": records}, indent=2))


if __name__ == "__main__":
    main()
