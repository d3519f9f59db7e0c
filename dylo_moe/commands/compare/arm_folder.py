"""The files of one training of a comparison: their paths, and the functions that read them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.commands.compare.arguments import BASE_ARM, OURS
from dylo_moe.commands.compare.grid import OWN_CELL, Cell
from dylo_moe.commands.compare.table import ArmRun, Rate
from dylo_moe.evaluation.losses import Losses, from_json, mean_loss
from dylo_moe.experts.config import lora_scale
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.routing.config import UNIFORM
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.file_names import MANIFEST, RESULT
from dylo_moe.utils.words import counted


class ArmFolder(NamedTuple):
    """One training: an arm with a seed, a budget and a cell of the grid; its files are found by its paths.

    The base is not trained, so it has a seed alone, by which the held-out rows are chosen.
    """

    output: Path
    """The folder of the comparison."""
    arm: str
    seed: int
    steps: int | None = None
    """The budget, in optimizer steps; None: as long as the flags say."""
    cell: Cell = OWN_CELL

    @property
    def folder(self) -> Path:
        """The folder of the arms with the same seed, budget and cell."""
        steps = "" if self.steps is None else f"steps-{self.steps}"
        return self.output / f"seed-{self.seed}" / steps / self.cell.folder

    @property
    def title(self) -> str:
        """The name of the arm, with its seed, budget and cell, in messages."""
        steps = "" if self.steps is None else counted(self.steps, "step")
        return ", ".join(filter(None, (f"seed {self.seed}", self.arm, steps, self.cell.title)))

    @property
    def run(self) -> Path:
        """The folder of the arm's training run."""
        return self.folder / self.arm

    @property
    def checkpoint(self) -> Path:
        """The final checkpoint of the arm's training run."""
        return self.run / RESULT

    @property
    def is_trained(self) -> bool:
        """Whether the arm's training has ended; true for the base, which needs none."""
        return self.arm == BASE_ARM or (self.checkpoint / MANIFEST).is_file()

    @property
    def losses(self) -> Path:
        """The file of the arm's losses, row by row."""
        return self.folder / "losses" / f"{self.arm}.json"

    @property
    def search_losses(self) -> Path:
        """The file of the arm's losses on the rows of the search, or of the reason why it has none."""
        return self.folder / "search" / f"{self.arm}.json"

    @property
    def evaluation(self) -> Path:
        """The folder of the arm's answers to benchmarks."""
        return self.folder / "evaluation" / self.arm


def identity(place: ArmFolder) -> str:
    """The hash of an arm's checkpoint, by which the losses of an arm that was trained again are recognised as
    outdated."""
    return BASE_ARM if place.arm == BASE_ARM else sha256((place.checkpoint / MANIFEST).read_bytes()).hexdigest()


def read_losses(place: ArmFolder, path: Path | None = None) -> Losses | None:
    """Read an arm's losses; None where they were not measured, or were measured with another checkpoint.

    Args:
        path: the file; by default that of the held-out rows.
    """
    path = place.losses if path is None else path
    if not path.is_file() or not place.is_trained:
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return from_json(content["losses"]) if content.get("of") == identity(place) else None


def failure(place: ArmFolder) -> str | None:
    """Why a cell has no loss, in words: it diverged; None where it did not."""
    if not place.search_losses.is_file():
        return None
    return json.loads(place.search_losses.read_text(encoding="utf-8")).get("diverged")


def note_failure(place: ArmFolder, reason: str) -> None:
    """Note that a cell diverged, so that it is neither trained nor measured again; see `failure`."""
    place.search_losses.parent.mkdir(parents=True, exist_ok=True)
    write_json(place.search_losses, {"of": None, "diverged": reason})


def search_loss(place: ArmFolder) -> float | None:
    """The mean over datasets of a cell's loss on the rows of the search; infinity where it diverged, None where it was
    not measured."""
    losses = read_losses(place, place.search_losses)
    if losses is not None:
        return mean_loss(losses)
    return None if failure(place) is None else math.inf


def read_benchmarks(place: ArmFolder) -> dict[str, Any]:
    """Read the results of `dylora eval` for an arm; empty where there are none yet."""
    path = place.evaluation / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_run(place: ArmFolder, benchmarks: Sequence[str]) -> ArmRun:
    """Read the sizes, losses and pass rates of an arm that was trained and evaluated."""
    losses = read_losses(place)
    assert losses is not None
    results = read_benchmarks(place)
    greedy = {name: results[name]["greedy"] for name in benchmarks}
    rates = {name: Rate(found["pass@1"], found["interval"]) for name, found in greedy.items()}
    if place.arm == BASE_ARM:
        return ArmRun(losses, 0, 0, 0, rates)
    manifest = read_manifest(place.checkpoint)
    facts, router = manifest["training"]["facts"], manifest["router"]
    sizes = [expert["parameters"] for expert in facts["experts"]]
    gate = facts["router"]["parameters"] if len(sizes) > 1 and place.arm == OURS else 0
    used = len(sizes) if router["policy"] == UNIFORM else router["top_k"]
    always = gate + facts.get("shared", {"parameters": 0})["parameters"]
    tokens, seconds = tokens_and_seconds(place.run)
    lora, settings = manifest["lora"], manifest["training"]["settings"]
    scale = lora_scale(lora["lora_alpha"], lora["r"], use_rslora=lora.get("use_rslora", False))
    return ArmRun(
        losses,
        sum(sizes) + always,
        sum(sizes[:used]) + always,
        tokens,
        rates,
        seconds,
        Cell(float(settings["learning_rate"]), scale),
    )


def tokens_and_seconds(run_folder: Path) -> tuple[int, float]:
    """The real tokens that a run was trained on, and the seconds of its steps, without evaluations and saving."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    tokens, seconds = 0, 0.0
    for values in lines:
        seen = int(values.get("num_input_tokens_seen", 0))
        if seen > tokens:
            speed = values.get("tokens_per_second")
            seconds += (seen - tokens) / speed if speed else 0.0
            tokens = seen
    return tokens, seconds
