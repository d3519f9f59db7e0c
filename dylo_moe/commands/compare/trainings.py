"""The trainings that a comparison needs, in the order in which they are made, and how many of how many tokens they are.

First the search, if there is a grid: every arm at every cell, with the first seed. Then every arm at its own best cell,
with every budget and every seed; what the search has trained already is among these, and is not trained again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dylo_moe.commands.compare.arguments import BASE_ARM, CompareArguments
from dylo_moe.commands.compare.arm_folder import ArmFolder, search_loss
from dylo_moe.commands.compare.grid import OWN_CELL, Cell, best_cell
from dylo_moe.report.comparison_record import num_trainings
from dylo_moe.utils.words import counted

Chosen = Mapping[tuple[str, int | None], Cell]
"""The best cell of each arm at each budget."""


def to_search(options: CompareArguments, output: Path) -> list[ArmFolder]:
    """The trainings of the search; none without a grid."""
    if not options.has_grid:
        return []
    return [
        ArmFolder(output, arm, int(options.seeds[0]), steps, cell)
        for steps in options.searched_steps
        for arm in trained_arms(options)
        for cell in options.cells
    ]


def to_judge(options: CompareArguments, output: Path, chosen: Chosen) -> dict[int | None, dict[int, list[ArmFolder]]]:
    """For each budget and seed every arm, the base among them, at its best cell."""
    return {
        steps: {
            seed: [
                ArmFolder(output, arm, seed)
                if arm == BASE_ARM
                else ArmFolder(output, arm, seed, steps, chosen[arm, steps])
                for arm in options.arms
            ]
            for seed in map(int, options.seeds)
        }
        for steps in options.steps
    }


def choose(options: CompareArguments, losses: Mapping[tuple[str, int | None, Cell], float]) -> Chosen:
    """Choose the best cell of each arm at each budget, by the losses of the search.

    A budget that was not searched takes over the choice of the first one.

    Raises:
        ValueError: for an arm that has no finite loss at any cell.
    """
    if not options.has_grid:
        return {(arm, steps): OWN_CELL for arm in trained_arms(options) for steps in options.steps}
    chosen = {}
    for arm in trained_arms(options):
        for steps in options.steps:
            searched = steps if steps in options.searched_steps else options.steps[0]
            best = best_cell({cell: losses[arm, searched, cell] for cell in options.cells})
            if best is None:
                raise ValueError(f"{arm} diverged at every cell of the grid; add lower values to --learning_rates")
            chosen[arm, steps] = best
    return chosen


def losses_of(places: Iterable[ArmFolder]) -> dict[tuple[str, int | None, Cell], float]:
    """The losses of the search; cells that were not measured yet are left out."""
    found = {(place.arm, place.steps, place.cell): search_loss(place) for place in places}
    return {key: loss for key, loss in found.items() if loss is not None}


def trained_arms(options: CompareArguments) -> list[str]:
    """The arms that are trained."""
    return [arm for arm in options.arms if arm != BASE_ARM]


def total(options: CompareArguments) -> int:
    """The number of trainings of a comparison."""
    return num_trainings(
        arms=len(trained_arms(options)),
        cells=len(options.cells) if options.has_grid else 0,
        searched=len(options.searched_steps),
        budgets=len(options.steps),
        seeds=len(options.seeds),
    )


def total_steps(options: CompareArguments) -> int:
    """The optimizer steps of all trainings; those without a budget count as one step each."""
    arms, steps = len(trained_arms(options)), sum(budget or 1 for budget in options.steps)
    searched = sum(budget or 1 for budget in options.searched_steps) if options.has_grid else 0
    return arms * (len(options.seeds) * steps + (len(options.cells) - 1) * searched)


def preview(options: CompareArguments, settings: Mapping[str, Any]) -> list[str]:
    """What is to be trained, in sentences: how often, and on at most how many tokens."""
    arms, num_seeds = len(trained_arms(options)), len(options.seeds)
    whom, said = counted(arms, "arm"), []
    compared, searched = arms * num_seeds * len(options.steps), arms * len(options.searched_steps)
    if options.has_grid:
        where = f" at {_steps(options.searched_steps)}" if options.budgets else ""
        said.append(
            f"the search: {whom} at {counted(len(options.cells), 'cell')} of the grid{where}, with seed "
            f"{options.seeds[0]}: {counted(searched * len(options.cells), 'training')}"
        )
    where = f" at {_steps(options.steps)}" if options.budgets else ""
    said.append(
        f"the comparison: {whom}{', each in its best cell,' if options.has_grid else ''}{where} with "
        f"{counted(num_seeds, 'seed')}: {counted(compared, 'training')}"
        + (f", of which the search makes {searched:,}" if options.has_grid else "")
    )
    tokens = [tokens_at_most(settings, budget) for budget in options.steps]
    known = [f"{count:,}" for count in tokens if count is not None]
    if known:
        said.append(f"a training takes at most {', '.join(known)} tokens")
    return said


def _steps(budgets: Iterable[int | None]) -> str:
    return f"{', '.join(map(str, budgets))} optimizer steps"


def tokens_at_most(settings: Mapping[str, Any], steps: int | None) -> int | None:
    """The tokens of a training whose rows are all full; None where epochs decide its length."""
    steps = settings.get("max_steps", -1) if steps is None else steps
    if steps < 1:
        return None
    rows = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    return steps * rows * settings["max_seq_length"]
