"""Read what the folder of a comparison holds, even if `dylora compare` was killed or is still running."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.report.html import REPORT
from dylo_moe.report.run_record import is_checkpoint, read_mapping
from dylo_moe.utils.file_names import RESULT
from dylo_moe.utils.settings_folder import SETTINGS_FILE
from dylo_moe.utils.words import counted

COMPARISON = "compare.json"
"""The result of a comparison."""

WINS, TIES, LOSES, UNKNOWN = "wins", "ties", "loses", "unknown"
"""The verdicts on our model against another arm, as `compare.json` has them."""


class Bounded(NamedTuple):
    """A figure with the ends of its 95 % interval."""

    value: float
    ends: tuple[float, float] | None
    """None where the interval is not known."""


class ComparedArm(NamedTuple):
    """One arm of a comparison, over all seeds; lists have a value for each seed."""

    name: str
    title: str
    parameters: int
    active: int
    tokens: list[int]
    mean: Bounded
    """The held-out loss, the mean over datasets, in nats per token."""
    datasets: dict[str, Bounded]
    difference: Bounded | None
    """The same minus ours; None for ours itself."""
    differences: dict[str, Bounded]
    by_seed: list[float]
    difference_by_seed: list[float]
    verdict: str | None
    pass_at_1: dict[str, list[Bounded]]


class Training(NamedTuple):
    """The training of one arm with one seed."""

    state: str
    page: Path | None
    """The page about its run; None where there is none."""


class ComparisonRecord(NamedTuple):
    """A comparison as its files describe it; what they do not hold is empty."""

    name: str
    """The name of the comparison's folder."""
    arms: list[ComparedArm]
    """The arms of the result, in the order of its table; empty without a result."""
    seeds: list[str]
    """The seeds of the result."""
    sentences: list[str]
    settings: dict[str, Any]
    evaluation: dict[str, Any]
    """The flags of `dylora eval`, where a task runs code."""
    trainings: dict[str, dict[str, Training]]
    """The trainings that were asked for, by seed and arm; the base needs none."""
    is_finished: bool
    missing: list[str]
    """Sentences about files that are not there or cannot be read."""


def is_comparison(folder: Path) -> bool:
    """Whether a folder is that of a comparison: it holds a result, or settings that name arms and seeds."""
    if (folder / COMPARISON).is_file():
        return True
    asked = read_mapping(folder / SETTINGS_FILE, [], "")
    return "arms" in asked and "seeds" in asked


def read_comparison(folder: Path) -> ComparisonRecord:
    """Read the files of a comparison that are there; `missing` tells about the others."""
    missing: list[str] = []
    asked = read_mapping(folder / SETTINGS_FILE, missing, "what was asked for is not known")
    result = read_mapping(folder / COMPARISON, missing, "there is no table yet")
    arms: list[ComparedArm] = []
    try:
        arms = [_arm(name, item) for name, item in result.get("arms", {}).items()]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        missing.append(f"{COMPARISON} cannot be read: {type(error).__name__}: {error}")
    seeds = _texts(result.get("seeds")) if arms else []
    wanted_seeds, wanted = _texts(asked.get("seeds")) or seeds, _texts(asked.get("arms")) or [arm.name for arm in arms]
    trainings = {
        seed: {arm: _training(folder, f"seed-{seed}", arm) for arm in wanted if arm != "base"} for seed in wanted_seeds
    }
    is_finished = bool(arms) and set(wanted_seeds) <= set(seeds) and set(wanted) <= {arm.name for arm in arms}
    if not is_finished:
        all_of_them = [item for of_seed in trainings.values() for item in of_seed.values()]
        num_done = sum(item.state == "trained" for item in all_of_them)
        verb = "is" if num_done == 1 else "are"
        missing.append(
            "the comparison has not ended, or did not end well: "
            f"{num_done:,} of {counted(len(all_of_them), 'training')} {verb} done"
        )
    settings = asked.get("settings") or result.get("settings")
    evaluation = asked.get("evaluation")
    return ComparisonRecord(
        folder.resolve().name,
        arms,
        seeds,
        _texts(result.get("sentences")) if arms else [],
        settings if isinstance(settings, dict) else {},
        evaluation if isinstance(evaluation, dict) else {},
        trainings,
        is_finished,
        missing,
    )


def _arm(name: str, item: dict[str, Any]) -> ComparedArm:
    difference = item["difference"]
    rates = {
        str(task): [Bounded(float(value), _ends(ends)) for value, ends in found]
        for task, found in item["pass_at_1"].items()
    }
    return ComparedArm(
        str(name),
        str(item["title"]),
        int(item["parameters"]),
        int(item["active"]),
        [int(count) for count in item["tokens"]],
        _bounded(item["losses"]["mean"]),
        {str(name): _bounded(found) for name, found in item["losses"]["datasets"].items()},
        None if difference is None else _bounded(difference["mean"]),
        {} if difference is None else {str(name): _bounded(found) for name, found in difference["datasets"].items()},
        [float(loss) for loss in item["by_seed"]],
        [float(loss) for loss in item["difference_by_seed"]],
        None if item["ours"] is None else str(item["ours"]),
        rates,
    )


def _bounded(item: dict[str, Any]) -> Bounded:
    return Bounded(float(item["value"]), _ends(item["interval"]))


def _ends(interval: Any) -> tuple[float, float] | None:
    low, high = (math.nan, math.nan) if interval is None else map(float, interval)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _texts(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, list) else []


def _training(folder: Path, seed: str, arm: str) -> Training:
    """How far the training of an arm is, and the page about its run if there is one inside the comparison's folder."""
    run = folder / seed / arm
    if "\0" in str(run) or not run.resolve().is_relative_to(folder.resolve()):
        return Training("not begun", None)
    state = "trained" if is_checkpoint(run / RESULT) else "begun" if run.is_dir() else "not begun"
    page = run / REPORT
    return Training(state, page.resolve() if page.is_file() else None)
