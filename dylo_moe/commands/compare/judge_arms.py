"""Judge the trained arms of a comparison: losses on held-out rows and on the rows of the search, and benchmarks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.compare.arguments import BASE_ARM
from dylo_moe.commands.compare.arm_folder import (
    ArmFolder,
    failure,
    identity,
    note_failure,
    read_benchmarks,
    read_losses,
)
from dylo_moe.commands.compare.processes import run_program
from dylo_moe.commands.compare.request import CompareRequest
from dylo_moe.evaluation.held_out import HeldOut, held_out
from dylo_moe.evaluation.losses import NotFinite, measure, to_json
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.training.resume import data_changes
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.screen import Screen


class Judge:
    """Measures losses; rows that it has read are kept, for they are the same for all arms of a seed.

    Args:
        request: what the comparison was asked for.
        screen: where the losses are said.
    """

    def __init__(self, request: CompareRequest, screen: Screen) -> None:
        self._request, self._screen = request, screen
        self._rows: dict[tuple[int, bool], HeldOut] = {}

    def search(self, places: Sequence[ArmFolder]) -> None:
        """Measure the trainings of the search on its rows; one whose loss is not finite is noted as diverged."""
        check_arms_share_data([place for place in places if place.is_trained])
        for place in places:
            if failure(place) is None and read_losses(place, place.search_losses) is None:
                try:
                    self._measure(place, place.checkpoint, for_search=True)
                except NotFinite as error:
                    note_failure(place, str(error))
                    self._screen.warn(f"{place.title}: {error}, so this cell cannot be the best one")

    def held_out(self, places: Sequence[ArmFolder]) -> None:
        """Measure the arms of one budget and seed on the held-out rows; the base is loaded from a trained arm's
        checkpoint."""
        trained = [place for place in places if place.arm != BASE_ARM]
        check_arms_share_data(trained)
        for place in places:
            if read_losses(place) is None:
                self._measure(place, trained[0].checkpoint if place.arm == BASE_ARM else place.checkpoint)

    def _measure(self, place: ArmFolder, checkpoint: Path, *, for_search: bool = False) -> None:
        """Measure and write the loss of an arm on every row."""
        model = load(checkpoint, self._request)
        tokenizer = load_tokenizer(str(model.base_id), revision=model.base_revision)
        key = (place.seed, for_search)
        if key not in self._rows:
            self._rows[key] = held_out(checkpoint, tokenizer, for_search=for_search)
        size, screen = self._request.batch_size, self._screen
        with model.route_to(None) if place.arm == BASE_ARM else nullcontext():
            losses = measure(model, self._rows[key], tokenizer, batch_size=size, screen=screen, what=place.title)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the trainings that may follow, in processes of their own
        path = place.search_losses if for_search else place.losses
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"of": identity(place), "losses": to_json(losses)})
        total, count = (sum(sum(getattr(item, name)) for item in losses.values()) for name in ("sums", "tokens"))
        kind = "token of the search" if for_search else "held-out token"
        screen.say(f"{place.title}: {total / count:.4f} nats per {kind}")


def check_arms_share_data(trained: Sequence[ArmFolder]) -> None:
    """Raise ValueError, with each difference, unless all these trainings were on the same rows."""
    records = {place: read_manifest(place.checkpoint)["training"] for place in trained}
    for place in trained[1:]:
        own, first = records[place], trained[0]
        others = data_changes(records[first], own["data"], [item["name"] for item in own["facts"]["data"]])
        if others:
            raise ValueError(f"{place.run} was trained on other data than {first.run}: {'; '.join(others)}")


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
