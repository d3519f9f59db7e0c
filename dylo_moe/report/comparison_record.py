"""Read what the folder of a comparison holds, even if `dylora compare` was killed or is still running."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.report.html import REPORT
from dylo_moe.report.run_record import finite, is_checkpoint, read_mapping
from dylo_moe.utils.file_names import RESULT
from dylo_moe.utils.settings_folder import SETTINGS_FILE
from dylo_moe.utils.words import counted

NUMBER = re.compile(r"\d[\d.]*(?:e[+-]?\d+)?")
"""A number in the name of a folder."""

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
    learning_rate: float | None
    scale: float | None
    """The factor s of the arm's adapters' s B A x; both are None where they are not known."""
    seconds: list[float]
    """The seconds of the training's steps; empty where they are not known."""


class SearchedCell(NamedTuple):
    """One arm at one cell of the grid that was searched."""

    title: str
    """The title of the arm."""
    steps: int | None
    """The budget; None where there is only one."""
    learning_rate: float | None
    scale: float | None
    """Both are None where they are the settings' own."""
    loss: float | None
    """The loss on the rows of the search, the mean over datasets, in nats per token; None where it diverged."""
    is_best: bool


class Search(NamedTuple):
    """The search of learning rate and scale."""

    seed: str
    rows: dict[str, int]
    """The number of rows of each dataset on which it was searched."""
    cells: list[SearchedCell]
    warnings: list[str]
    """Sentences about the ends of the grid."""


class Budget(NamedTuple):
    """The arms after one number of optimizer steps."""

    steps: int
    arms: list[ComparedArm]


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
    """The arms of the result, in the order of its table; empty without a result. With budgets, at the largest."""
    search: Search | None
    """The search; None where nothing was searched."""
    budgets: list[Budget]
    """The arms at each budget, the smallest first; empty where there is only one."""
    seeds: list[str]
    """The seeds of the result."""
    sentences: list[str]
    settings: dict[str, Any]
    evaluation: dict[str, Any]
    """The flags of `dylora eval`, where a task runs code."""
    trainings: dict[str, dict[str, Training]]
    """The trainings by seed and arm, with a grid or budgets by seed, budget, cell and arm; the base needs none."""
    is_finished: bool
    missing: list[str]
    """Sentences about files that are not there or cannot be read."""


def num_trainings(*, arms: int, cells: int, searched: int, budgets: int, seeds: int) -> int:
    """The number of trainings of a comparison.

    Args:
        arms: the arms that are trained.
        cells: the cells of the grid, which each arm is searched at; 0: there is no grid.
        searched: the budgets at which the grid is searched.
        budgets: all budgets, at least one.
        seeds: the seeds, of which the first is that of the search.
    """
    search, compared = arms * cells * searched, arms * budgets * seeds
    return search + compared - (arms * searched if cells else 0)


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
    search, budgets = None, []
    try:
        arms = _arms(result)
        search = _search(result["search"]) if result.get("search") else None
        budgets = [Budget(int(item["steps"]), _arms(item)) for item in result.get("budgets", [])]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        missing.append(f"{COMPARISON} cannot be read: {type(error).__name__}: {error}")
    seeds = _texts(result.get("seeds")) if arms else []
    wanted_seeds, wanted = _texts(asked.get("seeds")) or seeds, _texts(asked.get("arms")) or [arm.name for arm in arms]
    trained = [arm for arm in wanted if arm != "base"]
    axes = {name: _texts(asked.get(name)) for name in ("learning_rates", "scales", "budgets")}
    folders = {seed: [f"seed-{seed}"] for seed in wanted_seeds}
    if any(axes.values()):
        folders = {seed: _folders_in(folder, f"seed-{seed}", trained) for seed in wanted_seeds}
    trainings = {
        ", ".join([seed, *filter(None, place.removeprefix(f"seed-{seed}").split("/"))]): {
            arm: _training(folder, place, arm) for arm in trained
        }
        for seed, places in folders.items()
        for place in places
    }
    is_finished = bool(arms) and set(wanted_seeds) <= set(seeds) and set(wanted) <= {arm.name for arm in arms}
    is_finished = is_finished and _is_searched(axes, search, budgets)
    if not is_finished:
        num_done = sum(item.state == "trained" for of_seed in trainings.values() for item in of_seed.values())
        verb, num_all = "is" if num_done == 1 else "are", _num_asked(asked, axes, len(trained), len(wanted_seeds))
        missing.append(
            "the comparison has not ended, or did not end well: "
            f"{num_done:,} of {counted(num_all, 'training')} {verb} done"
        )
    settings = asked.get("settings") or result.get("settings")
    evaluation = asked.get("evaluation")
    return ComparisonRecord(
        folder.resolve().name,
        arms,
        search,
        budgets if len(budgets) > 1 else [],
        seeds,
        _texts(result.get("sentences")) if arms else [],
        settings if isinstance(settings, dict) else {},
        evaluation if isinstance(evaluation, dict) else {},
        trainings,
        is_finished,
        missing,
    )


def _num_asked(asked: dict[str, Any], axes: dict[str, list[str]], arms: int, seeds: int) -> int:
    """The number of trainings that were asked for."""
    has_grid, budgets = bool(axes["learning_rates"] or axes["scales"]), max(len(axes["budgets"]), 1)
    cells = max(len(axes["learning_rates"]), 1) * max(len(axes["scales"]), 1) if has_grid else 0
    searched = budgets if asked.get("search_every_budget") is True else 1
    return num_trainings(arms=arms, cells=cells, searched=searched, budgets=budgets, seeds=seeds)


def _is_searched(axes: dict[str, list[str]], search: Search | None, budgets: list[Budget]) -> bool:
    """Whether the result has all cells and budgets that were asked for."""
    cells = [] if search is None else search.cells
    found: dict[str, set[float | None]] = {
        "learning_rates": {cell.learning_rate for cell in cells},
        "scales": {cell.scale for cell in cells},
        "budgets": {budget.steps for budget in budgets},
    }
    return all({_number(text) for text in values} <= found[name] for name, values in axes.items())


def _number(text: str) -> float | None:
    """The number that a text holds; None where it holds none that is finite."""
    try:
        return finite(float(text))
    except ValueError:
        return None


def _folders_in(folder: Path, seed: str, arms: Sequence[str]) -> list[str]:
    """The folders of a seed in which arms were trained, with a grid or budgets, each as its path from the comparison's.

    They are in the order of their numbers.
    """
    root = folder / seed
    if "\0" in str(root) or not root.resolve().is_relative_to(folder.resolve()):
        return []
    recipes = [path for depth in ("*/*.yaml", "*/*/*.yaml") for path in root.glob(depth) if path.stem in arms]
    homes = {path.parent.relative_to(folder).as_posix() for path in recipes}
    homes = {home for home in homes if home.rpartition("/")[2].startswith(("steps-", "rate-", "scale-"))}
    return sorted(homes, key=lambda home: [float(number) for number in NUMBER.findall(home.partition("/")[2])])


def _search(item: dict[str, Any]) -> Search:
    cells = [
        SearchedCell(
            str(cell["title"]),
            None if cell["steps"] is None else int(cell["steps"]),
            finite(cell["learning_rate"]),
            finite(cell["scale"]),
            finite(cell["loss"]),
            cell["best"] is True,
        )
        for cell in item["cells"]
    ]
    rows = {str(name): int(count) for name, count in item["rows"].items()}
    return Search(str(item["seed"]), rows, cells, _texts(item["warnings"]))


def _arms(result: dict[str, Any]) -> list[ComparedArm]:
    return [_arm(name, item) for name, item in result.get("arms", {}).items()]


def _arm(name: str, item: dict[str, Any]) -> ComparedArm:
    difference, cell = item["difference"], item.get("cell") or {}
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
        finite(cell.get("learning_rate")),
        finite(cell.get("scale")),
        [float(seconds) for seconds in item.get("seconds", [])],
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
