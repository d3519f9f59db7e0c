"""Does routing help? The same data, tokens and seeds for ours and for what it must beat; the command `dylora compare`.

Every arm and seed is one `dylora train` in a process of its own:

    OUTPUT/settings.json                   what was asked for
    OUTPUT/seed-S/ARM/                     its run, as dylora train leaves it; ARM.yaml its recipe, ARM.log what it said
    OUTPUT/seed-S/losses/ARM.json          its loss on every held-out row
    OUTPUT/seed-S/evaluation/ARM/          of `dylora eval`, where code is judged
    OUTPUT/compare.json, compare.md        the table, and what it says
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.compare.arguments import BASE_ARM, OURS, CompareRequest, settings_of_arm
from dylo_moe.commands.compare.processes import LOCK, hold, run_program
from dylo_moe.commands.compare.table import ArmRun, Rate, as_json, as_markdown, as_tables, make_lines, sentences
from dylo_moe.commands.recipe import in_full
from dylo_moe.data.config import DataConfig
from dylo_moe.evaluation.held_out import HeldOut, held_out
from dylo_moe.evaluation.losses import Losses, from_json, measure, to_json
from dylo_moe.model.checkpoint import MANIFEST, read_manifest
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import UNIFORM
from dylo_moe.training.arguments import ModelArguments
from dylo_moe.training.resume import data_changes
from dylo_moe.training.run_folder import save_config
from dylo_moe.training.stopping import StopRequest
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.errors import Stopped

SETTINGS_FILE = "settings.json"

CAN_GROW = ("seeds", "arms", "tasks")
"""What a comparison may be asked for more of."""


class ArmFolder(NamedTuple):
    """Where one arm with one seed lies."""

    folder: Path
    """Of the seed."""
    arm: str
    seed: int

    @property
    def run(self) -> Path:
        """Of its training."""
        return self.folder / self.arm

    @property
    def checkpoint(self) -> Path:
        """What it ended with."""
        return self.run / "checkpoint"

    @property
    def losses(self) -> Path:
        """Its losses, row by row."""
        return self.folder / "losses" / f"{self.arm}.json"

    @property
    def evaluation(self) -> Path:
        """Its answers to benchmarks."""
        return self.folder / "evaluation" / self.arm


def compare(request: CompareRequest) -> Path:
    """Train, judge and compare as the flags say; returns OUTPUT.

    Raises:
        ValueError: where a training or an evaluation failed, with its last words; for an output folder of another
            comparison.
        Stopped: when SIGTERM or SIGINT ended it; started again, it goes on where it was.
    """
    try:
        return _compare(request)
    except Stopped as stopped:
        raise Stopped(stopped.signal, "type the same command again, and it goes on where it was") from None


def _compare(request: CompareRequest) -> Path:
    console, output = Console(), request.output
    transformers_logging.disable_progress_bar()
    refuse_foreign(output)
    output.mkdir(parents=True, exist_ok=True)
    with StopRequest(), hold(output, console):
        take_folder(request)
        seeds = [int(seed) for seed in request.options.seeds]
        places = {
            (seed, arm): ArmFolder(output / f"seed-{seed}", arm, seed) for seed in seeds for arm in request.options.arms
        }
        train_all([place for place in places.values() if place.arm != BASE_ARM], request, console)
        for seed in seeds:
            evaluate_seed(seed, [places[seed, arm] for arm in request.options.arms], request, console)
        runs = {
            arm: [read_run(places[seed, arm], request.options.benchmarks) for seed in seeds]
            for arm in request.options.arms
        }
    lines = make_lines(runs)
    said = sentences(lines, seeds)
    write_json(output / "compare.json", {"seeds": seeds, "settings": request.settings, **as_json(lines, said)})
    (output / "compare.md").write_text(as_markdown(lines, said), encoding="utf-8")
    for table in as_tables(lines, width=console.width):
        console.print(table)
    for text in said:
        console.print(Text(text), soft_wrap=True)
    console.print(f"\ntable       {output / 'compare.md'}", highlight=False, soft_wrap=True)
    console.print(f"figures     {output / 'compare.json'}", highlight=False, soft_wrap=True)
    return output


def refuse_foreign(output: Path) -> None:
    """Raises ValueError for a folder that holds something, but no comparison."""
    if not output.exists() or (output / SETTINGS_FILE).is_file():
        return
    if not output.is_dir() or [item.name for item in output.iterdir() if item.name != LOCK]:
        raise ValueError(f"output_dir {output} is not empty, and holds no comparison; choose a new one")


def take_folder(request: CompareRequest) -> None:
    """Begin a comparison in its folder, or go on with it.

    Raises:
        ValueError: for a comparison with other settings, naming them.
    """
    path = request.output / SETTINGS_FILE
    now: dict[str, Any] = {"settings": request.settings, "evaluation": request.evaluation}
    now |= {name: getattr(request.options, name) for name in CAN_GROW}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = _changed(before, now)
        if changed:
            raise ValueError(
                f"{request.output} holds a comparison with other settings: {'; '.join(changed)}. Give the same ones, "
                "to go on with it, or another --output_dir"
            )
        now |= {name: list(dict.fromkeys([*before[name], *now[name]])) for name in CAN_GROW}
        now["evaluation"] = now["evaluation"] or before["evaluation"]
    write_json(path, now)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings of the trainings that are others now, and of the evaluations, where there were any, in words."""
    kinds = (ModelArguments, DataConfig)
    pairs = [(in_full(before["settings"], kinds), in_full(now["settings"], kinds))]
    if before["evaluation"] and now["evaluation"]:
        pairs.append((before["evaluation"], now["evaluation"]))
    return [
        f"{name} is {wanted.get(name)!r}, was {was.get(name)!r}"
        for was, wanted in pairs
        for name in sorted(was.keys() | wanted.keys())
        if was.get(name) != wanted.get(name)
    ]


# Training.


def train_all(places: Sequence[ArmFolder], request: CompareRequest, console: Console) -> None:
    """Train what is not trained yet, one after the other."""
    left = [place for place in places if not (place.checkpoint / MANIFEST).is_file()]
    if len(left) < len(places):
        console.print(f"{len(places) - len(left)} of {len(places)} trainings are done already", highlight=False)
    started = time.monotonic()
    for number, place in enumerate(left):
        rest = (time.monotonic() - started) / number * (len(left) - number) if number else None
        about = "" if rest is None else f", about {rest / 60:.0f} min left in all"
        title = f"training {len(places) - len(left) + number + 1} of {len(places)}: seed {place.seed}, {place.arm}"
        train_arm(place, request, console, f"{title}{about}")


def train_arm(place: ArmFolder, request: CompareRequest, console: Console, title: str) -> None:
    """One training, in a process of its own; an interrupted one goes on."""
    place.folder.mkdir(parents=True, exist_ok=True)
    recipe = place.folder / f"{place.arm}.yaml"
    save_config(settings_of_arm(place.arm, request.settings, seed=place.seed), recipe)
    began = time.monotonic()
    run_program(
        [
            *(sys.executable, "-m", "dylo_moe.cli", "train", "--config", str(recipe)),
            *("--output_dir", str(place.run), "--resume_from_checkpoint", "auto"),
        ],
        log=place.folder / f"{place.arm}.log",
        title=title,
        console=console,
    )
    step = read_manifest(place.checkpoint)["training"]["step"]
    console.print(
        f"seed {place.seed}, {place.arm}: trained to step {step} in {time.monotonic() - began:.0f} s",
        highlight=False,
    )


# Judging.


def evaluate_seed(seed: int, places: Sequence[ArmFolder], request: CompareRequest, console: Console) -> None:
    """Measure what is not measured yet of one seed's arms."""
    trained = [place for place in places if place.arm != BASE_ARM]
    records = {place.arm: read_manifest(place.checkpoint)["training"] for place in trained}
    data = records[OURS]["data"]
    for place in trained:
        names = [item["name"] for item in records[OURS]["facts"]["data"]]
        differences = data_changes(data, records[place.arm]["data"], names)
        if differences:
            raise ValueError(f"{place.run} was trained on other data than {OURS}: {'; '.join(differences)}")
    left = [place for place in places if read_losses(place) is None]
    held: HeldOut | None = None
    for place in left:
        checkpoint = place.checkpoint if place.arm != BASE_ARM else trained[0].checkpoint
        model = load(checkpoint, request)
        tokenizer = load_tokenizer(str(model.base_id), revision=model.base_revision)
        held = held_out(checkpoint, tokenizer) if held is None else held
        with model.route_to(None) if place.arm == BASE_ARM else nullcontext():
            losses = measure(model, held, tokenizer, batch_size=request.batch_size, console=console)
        place.losses.parent.mkdir(exist_ok=True)
        write_json(place.losses, {"of": identity(place), "losses": to_json(losses)})
        total, count = (sum(sum(getattr(item, name)) for item in losses.values()) for name in ("sums", "tokens"))
        console.print(f"seed {seed}, {place.arm}: {total / count:.4f} nats per held-out token", highlight=False)
        del model
        gc.collect()
    for place in places if request.evaluation else []:
        run_benchmarks(place, trained[0], request, console)


def identity(place: ArmFolder) -> str:
    """What a checkpoint is recognised by, so that losses of one that was trained anew are measured anew."""
    return BASE_ARM if place.arm == BASE_ARM else sha256((place.checkpoint / MANIFEST).read_bytes()).hexdigest()


def read_losses(place: ArmFolder) -> Losses | None:
    """The losses of an arm's rows; None where they were not measured, or not of this checkpoint."""
    if not place.losses.is_file():
        return None
    content = json.loads(place.losses.read_text(encoding="utf-8"))
    return from_json(content["losses"]) if content["of"] == identity(place) else None


def load(checkpoint: Path, request: CompareRequest) -> DyLoRAMoE:
    """A trained arm, in the dtype and on the kind of device that it was trained on."""
    dtype = torch.bfloat16 if request.settings["bf16"] else "auto"
    model = DyLoRAMoE.from_pretrained(str(checkpoint), dtype=dtype).eval()
    if torch.cuda.is_available() and not request.settings.get("use_cpu") and model.device.type != "cuda":
        model.to("cuda")
    return model


def run_benchmarks(place: ArmFolder, trained: ArmFolder, request: CompareRequest, console: Console) -> None:
    """`dylora eval` of one arm, in a process of its own; it keeps what it has done already."""
    tasks = request.options.benchmarks
    results = read_arm_results(place)
    if all(task in results for task in tasks):
        return
    is_base = place.arm == BASE_ARM
    checkpoint = trained.checkpoint if is_base else place.checkpoint
    flags = {"tasks": ",".join(tasks), "output_dir": place.evaluation, "seed": place.seed, **request.evaluation}
    flags |= {"expert": "base"} if is_base else {}
    flags |= {"data_dir": request.settings["data_dir"]} if request.settings.get("data_dir") else {}
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    place.evaluation.parent.mkdir(parents=True, exist_ok=True)
    run_program(
        [sys.executable, "-m", "dylo_moe.cli", "eval", str(checkpoint), *words],
        log=place.evaluation.parent / f"{place.arm}.log",
        title=f"seed {place.seed}, {place.arm}: {' and '.join(tasks)}",
        console=console,
    )


def read_arm_results(place: ArmFolder) -> dict[str, Any]:
    """What `dylora eval` found; empty where it has not."""
    path = place.evaluation / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_run(place: ArmFolder, benchmarks: Sequence[str]) -> ArmRun:
    """An arm that was trained and judged."""
    losses = read_losses(place)
    assert losses is not None
    results = read_arm_results(place)
    greedy = {name: results[name]["greedy"] for name in benchmarks}
    rates = {name: Rate(found["pass@1"], found["interval"]) for name, found in greedy.items()}
    if place.arm == BASE_ARM:
        return ArmRun(losses, 0, 0, 0, rates)
    manifest = read_manifest(place.checkpoint)
    facts, router = manifest["training"]["facts"], manifest["router"]
    sizes = [expert["parameters"] for expert in facts["experts"]]
    gate = facts["router"]["parameters"] if len(sizes) > 1 and place.arm == OURS else 0
    used = len(sizes) if router["policy"] == UNIFORM else router["top_k"]
    return ArmRun(losses, sum(sizes) + gate, sum(sizes[:used]) + gate, tokens_seen(place.run), rates)


def tokens_seen(run_folder: Path) -> int:
    """Real tokens that a run trained on."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(int(values.get("num_input_tokens_seen", 0)) for values in map(json.loads, lines))
