"""The command `dylora compare`: train and evaluate our model and its rivals on the same data, tokens and seeds.

Every arm with every seed is one `dylora train` in a separate process. These are the files:

    OUTPUT/settings.json                   the settings and the arms, seeds and tasks
    OUTPUT/seed-S/ARM/                     its run, as dylora train leaves it; its recipe ARM.yaml, its output ARM.log
    OUTPUT/seed-S/losses/ARM.json          its loss on every held-out row
    OUTPUT/seed-S/evaluation/ARM/          the results of `dylora eval`, where tasks run code
    OUTPUT/compare.json, compare.md        the table, and its conclusions in words
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.compare.arguments import BASE_ARM, OURS
from dylo_moe.commands.compare.arm_folder import ArmFolder, identity, read_benchmarks, read_losses, read_run
from dylo_moe.commands.compare.processes import LOCK, hold, run_program
from dylo_moe.commands.compare.request import CompareRequest, settings_of_arm
from dylo_moe.commands.compare.table import ArmRun, as_json, as_markdown, as_table, make_lines, sentences
from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.evaluation.held_out import HeldOut, held_out
from dylo_moe.evaluation.losses import measure, to_json
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.parsing.recipe import in_full
from dylo_moe.report.comparison_record import COMPARISON
from dylo_moe.training.preflight import check_before_reading
from dylo_moe.training.resume import data_changes
from dylo_moe.training.run_folder import save_config
from dylo_moe.training.stopping import StopRequest
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.differences import Difference, differences
from dylo_moe.utils.errors import Stopped
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.settings_folder import Settings, refuse_foreign, take_folder
from dylo_moe.utils.words import counted

CAN_GROW = ("seeds", "arms", "tasks")
"""What a comparison may be asked for more of, when it is started again."""


def compare(request: CompareRequest) -> Path:
    """Train, evaluate and compare as the flags say; returns the output folder.

    Raises:
        ValueError: where a training or an evaluation failed, with its last line; for an output folder of another
            comparison.
        Stopped: when SIGTERM or SIGINT ended it; the same command resumes it.
    """
    try:
        return _compare(request)
    except Stopped as stopped:
        raise Stopped(stopped.signal, "type the same command again to resume it") from None


def _compare(request: CompareRequest) -> Path:
    screen, output = Screen("compare"), request.output
    transformers_logging.disable_progress_bar()
    refuse_foreign(output, what="comparison", beside=[LOCK])
    check_before_reading(*request.configs, is_new=False)
    output.mkdir(parents=True, exist_ok=True)
    asked: Settings = {"settings": request.settings, "evaluation": request.evaluation}
    asked |= {name: getattr(request.options, name) for name in CAN_GROW}
    with StopRequest(), hold(output, screen):
        take_folder(output, asked, what="comparison", changes=_changes, merge=_merge, beside=[LOCK])
        arms_of_seed = arm_folders(request)
        train_all([place for places in arms_of_seed.values() for place in places], request, screen)
        for places in arms_of_seed.values():
            evaluate_seed(places, request, screen)
        runs = {
            arm: [read_run(places[number], request.options.benchmarks) for places in arms_of_seed.values()]
            for number, arm in enumerate(request.options.arms)
        }
    write_result(request, runs, list(arms_of_seed), screen)
    return output


def arm_folders(request: CompareRequest) -> dict[int, list[ArmFolder]]:
    """List the folders of each seed's arms, in the order of the flags."""
    options = request.options
    return {
        seed: [ArmFolder(request.output / f"seed-{seed}", arm, seed) for arm in options.arms]
        for seed in map(int, options.seeds)
    }


def write_result(request: CompareRequest, runs: dict[str, list[ArmRun]], seeds: Sequence[int], screen: Screen) -> None:
    """Write the table as JSON and Markdown, and print it with its conclusions in words."""
    output, lines = request.output, make_lines(runs)
    said = sentences(lines, seeds)
    write_json(output / COMPARISON, {"seeds": seeds, "settings": request.settings, **as_json(lines, said)})
    (output / "compare.md").write_text(as_markdown(lines, said), encoding="utf-8")
    screen.say(as_table(lines))
    for text in said:
        screen.say(text)
    screen.rule()
    screen.file("figures", output / COMPARISON)
    screen.result("table", output / "compare.md")


# The folder.


def _changes(before: Settings, now: Settings) -> list[Difference]:
    """List the settings of the trainings that differ, and those of the evaluations where both comparisons have some."""
    pairs = [(in_full(before["settings"], TRAIN_CONFIGS), in_full(now["settings"], TRAIN_CONFIGS))]
    if before["evaluation"] and now["evaluation"]:
        pairs.append((before["evaluation"], now["evaluation"]))
    return [item for was, wanted in pairs for item in differences(was, wanted)]


def _merge(before: Settings, now: Settings) -> Settings:
    more = {name: list(dict.fromkeys([*before[name], *now[name]])) for name in CAN_GROW}
    return {**now, **more, "evaluation": now["evaluation"] or before["evaluation"]}


# Training.


def train_all(places: Sequence[ArmFolder], request: CompareRequest, screen: Screen) -> None:
    """Train the arms that are not trained yet, one after another."""
    places = [place for place in places if place.arm != BASE_ARM]
    left = [place for place in places if not place.is_trained]
    num_done = len(places) - len(left)
    if num_done:
        verb = "is" if num_done == 1 else "are"
        screen.say(f"{num_done} of {counted(len(places), 'training')} {verb} already done")
    started = time.monotonic()
    for number, place in enumerate(left):
        seconds = (time.monotonic() - started) / number * (len(left) - number) if number else None
        title = f"training {num_done + number + 1} of {len(places)}: {place.title}{time_left(seconds)}"
        train_arm(place, request, screen, title)


def time_left(seconds: float | None) -> str:
    """The end of a title that says how long the rest takes; empty where that is not known yet."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f", about {counted(minutes, 'minute')} left in all" if minutes else ", less than a minute left in all"


def train_arm(place: ArmFolder, request: CompareRequest, screen: Screen, title: str) -> None:
    """Train one arm in a separate process; an interrupted training is resumed."""
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
        screen=screen,
    )
    step = read_manifest(place.checkpoint)["training"]["step"]
    screen.say(f"{place.title}: trained to step {step} in {time.monotonic() - began:.0f} s")


# Evaluating.


def evaluate_seed(places: Sequence[ArmFolder], request: CompareRequest, screen: Screen) -> None:
    """Measure the arms of one seed that are not measured yet; the base is loaded from a trained arm's checkpoint."""
    trained = [place for place in places if place.arm != BASE_ARM]
    check_arms_share_data(trained)
    held: HeldOut | None = None
    for place in places:
        if read_losses(place) is None:
            checkpoint = trained[0].checkpoint if place.arm == BASE_ARM else place.checkpoint
            held = measure_losses(place, checkpoint, held, request, screen)
            gc.collect()
    for place in places if request.evaluation else []:
        run_benchmarks(place, trained[0], request, screen)


def check_arms_share_data(trained: Sequence[ArmFolder]) -> None:
    """Raise ValueError, with each difference, unless all arms of a seed were trained on the same rows."""
    records = {place.arm: read_manifest(place.checkpoint)["training"] for place in trained}
    for place in trained:
        own = records[place.arm]
        others = data_changes(records[OURS], own["data"], [item["name"] for item in own["facts"]["data"]])
        if others:
            raise ValueError(f"{place.run} was trained on other data than {OURS}: {'; '.join(others)}")


def measure_losses(
    place: ArmFolder, checkpoint: Path, held: HeldOut | None, request: CompareRequest, screen: Screen
) -> HeldOut:
    """Measure and write the loss of an arm on every held-out row.

    Args:
        held: the held-out rows of the seed; None: read them.

    Returns:
        The held-out rows, which are the same for all arms of a seed.
    """
    model = load(checkpoint, request)
    tokenizer = load_tokenizer(str(model.base_id), revision=model.base_revision)
    held = held_out(checkpoint, tokenizer) if held is None else held
    with model.route_to(None) if place.arm == BASE_ARM else nullcontext():
        losses = measure(model, held, tokenizer, batch_size=request.batch_size, screen=screen, what=place.title)
    place.losses.parent.mkdir(exist_ok=True)
    write_json(place.losses, {"of": identity(place), "losses": to_json(losses)})
    total, count = (sum(sum(getattr(item, name)) for item in losses.values()) for name in ("sums", "tokens"))
    screen.say(f"{place.title}: {total / count:.4f} nats per held-out token")
    return held


def load(checkpoint: Path, request: CompareRequest) -> DyLoRAMoE:
    """Load a trained arm, in the dtype and on the kind of device that it was trained with."""
    dtype = torch.bfloat16 if request.settings["bf16"] else "auto"
    model = DyLoRAMoE.from_pretrained(str(checkpoint), dtype=dtype).eval()
    if torch.cuda.is_available() and not request.settings.get("use_cpu") and model.device.type != "cuda":
        model.to("cuda")
    return model


def run_benchmarks(place: ArmFolder, trained: ArmFolder, request: CompareRequest, screen: Screen) -> None:
    """Run `dylora eval` for one arm in a separate process; answers that it already has are kept.

    Args:
        trained: an arm whose checkpoint is used to load the base, where `place` is the base.
    """
    tasks = request.options.benchmarks
    results = read_benchmarks(place)
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
        title=f"{place.title}: {' and '.join(tasks)}",
        screen=screen,
    )
