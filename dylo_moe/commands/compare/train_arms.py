"""Train the arms of a comparison, one after another, each as one `dylora train` in a process of its own."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Collection, Sequence

from dylo_moe.commands.compare.arm_folder import ArmFolder, failure, note_failure
from dylo_moe.commands.compare.processes import run_program
from dylo_moe.commands.compare.request import CompareRequest, settings_of_arm
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.training.run_folder import save_config
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.words import counted

DIVERGED = re.compile(r"\bNaN\b|not finite")
"""What the last line of a training says whose weights or loss became infinite or NaN."""


class Progress:
    """Counts the trainings of a comparison, and tells how long the rest takes.

    Args:
        total: the number of trainings.
        steps: the optimizer steps of all trainings together; trainings without a budget count as one step each.
        done: those that were trained before.
    """

    def __init__(self, total: int, steps: int, done: Collection[ArmFolder]) -> None:
        self.total, self._steps_left = total, steps
        self._counted: set[ArmFolder] = set()
        self._began, self._steps_made = time.monotonic(), 0
        for place in done:
            self.count(place)

    @property
    def done(self) -> int:
        """The number of trainings that have ended."""
        return len(self._counted)

    def count(self, place: ArmFolder) -> None:
        """Count a training that was made before, if it is not counted yet."""
        if place not in self._counted:
            self._counted.add(place)
            self._steps_left -= place.steps or 1

    def title(self, place: ArmFolder) -> str:
        """The title of the next training, with the time that is left if all steps take as long."""
        seconds = None
        if self._steps_made:
            seconds = (time.monotonic() - self._began) / self._steps_made * self._steps_left
        return f"training {self.done + 1} of {self.total}: {place.title}{time_left(seconds)}"

    def advance(self, place: ArmFolder) -> None:
        """Count a training that has just ended."""
        self.count(place)
        self._steps_made += place.steps or 1


def time_left(seconds: float | None) -> str:
    """The end of a title that says how long the rest takes; empty where that is not known yet."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f", about {counted(minutes, 'minute')} left in all" if minutes else ", less than a minute left in all"


def train_all(
    places: Sequence[ArmFolder], request: CompareRequest, screen: Screen, progress: Progress, *, is_search: bool = False
) -> None:
    """Train the arms that are not trained yet.

    Args:
        is_search: whether a training that diverges is noted and passed over, as a cell that cannot be the best one.
    """
    for place in places:
        if is_done(place):
            progress.count(place)
            continue
        try:
            train_arm(place, request, screen, progress.title(place))
        except ValueError as error:
            if not is_search or not DIVERGED.search(str(error)):
                raise
            note_failure(place, str(error))
            screen.warn(f"{place.title}: the training diverged, so this cell cannot be the best one ({error})")
        progress.advance(place)


def is_done(place: ArmFolder) -> bool:
    """Whether a training has ended, or is known to diverge."""
    return place.is_trained or failure(place) is not None


def train_arm(place: ArmFolder, request: CompareRequest, screen: Screen, title: str) -> None:
    """Train one arm in a separate process; an interrupted training is resumed."""
    place.folder.mkdir(parents=True, exist_ok=True)
    recipe = place.folder / f"{place.arm}.yaml"
    settings = settings_of_arm(place.arm, request.settings, seed=place.seed, steps=place.steps, cell=place.cell)
    save_config(settings, recipe)
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
