"""The files of one arm with one seed: their paths, and the functions that read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.commands.compare.arguments import BASE_ARM, OURS
from dylo_moe.commands.compare.table import ArmRun, Rate
from dylo_moe.evaluation.losses import Losses, from_json
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.routing.config import UNIFORM
from dylo_moe.utils.file_names import MANIFEST, RESULT


class ArmFolder(NamedTuple):
    """The paths of the files of one arm with one seed."""

    folder: Path
    """The folder of the seed."""
    arm: str
    seed: int

    @property
    def title(self) -> str:
        """The name of the arm and its seed in messages."""
        return f"seed {self.seed}, {self.arm}"

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
    def evaluation(self) -> Path:
        """The folder of the arm's answers to benchmarks."""
        return self.folder / "evaluation" / self.arm


def identity(place: ArmFolder) -> str:
    """The hash of an arm's checkpoint, by which the losses of an arm that was trained again are recognised as
    outdated."""
    return BASE_ARM if place.arm == BASE_ARM else sha256((place.checkpoint / MANIFEST).read_bytes()).hexdigest()


def read_losses(place: ArmFolder) -> Losses | None:
    """Read an arm's losses; None where they were not measured, or were measured with another checkpoint."""
    if not place.losses.is_file():
        return None
    content = json.loads(place.losses.read_text(encoding="utf-8"))
    return from_json(content["losses"]) if content["of"] == identity(place) else None


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
    return ArmRun(losses, sum(sizes) + always, sum(sizes[:used]) + always, tokens_seen(place.run), rates)


def tokens_seen(run_folder: Path) -> int:
    """The real tokens that a run was trained on."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(int(values.get("num_input_tokens_seen", 0)) for values in map(json.loads, lines))
