"""The command `dylora compare`: train and evaluate our model and its rivals on the same data, tokens and seeds.

Every training is one `dylora train` in a separate process (trainings.py says which there are). These are the files:

    OUTPUT/settings.json                   the settings and the arms, seeds, tasks, grid and budgets
    OUTPUT/seed-S/ARM/                     its run, as dylora train leaves it; its recipe ARM.yaml, its output ARM.log
    OUTPUT/seed-S/losses/ARM.json          its loss on every held-out row
    OUTPUT/seed-S/search/ARM.json          its loss on every row of the search
    OUTPUT/seed-S/evaluation/ARM/          the results of `dylora eval`, where tasks run code
    OUTPUT/compare.json, compare.md        the table, and its conclusions in words

With budgets and a grid, seed-S is seed-S/steps-N/rate-R-scale-S, and the base alone is in seed-S itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from dylo_moe.commands.compare.arguments import BASE_ARM
from dylo_moe.commands.compare.arm_folder import ArmFolder, read_losses, read_run
from dylo_moe.commands.compare.grid_table import (
    Found,
    budget_sentences,
    grid_json,
    grid_markdown,
    grid_sentences,
    grid_table,
)
from dylo_moe.commands.compare.judge_arms import Judge, run_benchmarks
from dylo_moe.commands.compare.processes import LOCK, hold
from dylo_moe.commands.compare.request import CompareRequest
from dylo_moe.commands.compare.table import (
    ArmLine,
    ArmRun,
    as_json,
    as_markdown,
    as_table,
    lines_json,
    make_lines,
    sentences,
)
from dylo_moe.commands.compare.train_arms import Progress, is_done, train_all
from dylo_moe.commands.compare.trainings import choose, losses_of, preview, to_judge, to_search, total, total_steps
from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.parsing.recipe import in_full
from dylo_moe.report.comparison_record import COMPARISON
from dylo_moe.training.preflight import check_before_reading
from dylo_moe.training.stopping import StopRequest
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.differences import Difference, differences
from dylo_moe.utils.errors import Stopped
from dylo_moe.utils.owner import Owner
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.settings_folder import Settings, refuse_foreign, take_folder
from dylo_moe.utils.words import counted

CAN_GROW = ("seeds", "arms", "tasks", "learning_rates", "scales", "budgets")
"""What a comparison may be asked for more of, when it is started again."""


def compare(request: CompareRequest) -> Path:
    """Train, evaluate and compare as the flags say; returns the output folder.

    Raises:
        ValueError: where a training or an evaluation failed, with its last line; for an output folder of another
            comparison, or one that another process is comparing in.
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
    asked |= {name: getattr(request.options, name) for name in (*CAN_GROW, "search_every_budget")}
    with StopRequest(), Owner() as owner:
        owner.take(output, "comparing")
        lines, found = _trained_and_judged(request, asked, screen)
    write_result(request, lines, found, screen)
    return output


def _trained_and_judged(
    request: CompareRequest, asked: Settings, screen: Screen
) -> tuple[dict[int | None, list[ArmLine]], Found | None]:
    """Do the work of a comparison, once the processes that a killed call has started have ended."""
    output = request.output
    with hold(output, screen):
        take_folder(output, asked, what="comparison", changes=_changes, merge=_merge, beside=[LOCK])
        found, judged = train_and_judge(request, screen)
        lines = {
            steps: make_lines(_runs(of_seed, request.options.benchmarks if steps == request.options.steps[-1] else []))
            for steps, of_seed in judged.items()
        }
    return lines, found


Judged = dict[int | None, dict[int, list[ArmFolder]]]
"""The trainings that are judged on held-out rows: for each budget and seed every arm, the base among them."""


def train_and_judge(request: CompareRequest, screen: Screen) -> tuple[Found | None, Judged]:
    """Search the grid if there is one, then train and judge every arm at its best cell; what is done is kept.

    Returns:
        What the search found, and the trainings that were judged.
    """
    options, judge = request.options, Judge(request, screen)
    search = to_search(options, request.output)
    known = dict.fromkeys([*search, *_trained(_judged_so_far(request, search))])
    progress = Progress(total(options), total_steps(options), list(filter(is_done, known)))
    for sentence in preview(options, request.settings):
        screen.say(sentence)
    if progress.done:
        verb = "is" if progress.done == 1 else "are"
        screen.say(f"{progress.done} of {counted(progress.total, 'training')} {verb} already done")
    train_all(search, request, screen, progress, is_search=True)
    judge.search(search)
    losses = losses_of(search)
    chosen = choose(options, losses)
    judged = to_judge(options, request.output, chosen)
    train_all(_trained(judged), request, screen, progress)
    for of_seed in judged.values():
        for places in of_seed.values():
            judge.held_out(places)
    if request.evaluation:
        for places in judged[options.steps[-1]].values():
            trained = next(place for place in places if place.arm != BASE_ARM)
            for place in places:
                run_benchmarks(place, trained, request, screen)
    return Found(losses, chosen, _rows_of(search)) if search else None, judged


def _judged_so_far(request: CompareRequest, search: Sequence[ArmFolder]) -> Judged:
    """The trainings to judge, if all of the search is measured; else none is known yet."""
    losses = losses_of(search)
    if len(losses) < len(search):
        return {}
    return to_judge(request.options, request.output, choose(request.options, losses))


def _trained(judged: Judged) -> list[ArmFolder]:
    """The trainings among those that are judged."""
    of_seeds = [places for of_seed in judged.values() for places in of_seed.values()]
    return [place for places in of_seeds for place in places if place.arm != BASE_ARM]


def _runs(of_seed: dict[int, list[ArmFolder]], benchmarks: Sequence[str]) -> dict[str, list[ArmRun]]:
    """The figures of each arm, in the order of the seeds."""
    first, *_ = of_seed.values()
    return {
        place.arm: [read_run(places[number], benchmarks) for places in of_seed.values()]
        for number, place in enumerate(first)
    }


def _rows_of(search: Sequence[ArmFolder]) -> dict[str, int]:
    """The number of rows of each dataset that the search was judged on."""
    found = [losses for place in search if (losses := read_losses(place, place.search_losses)) is not None]
    return {name: len(item.tokens) for name, item in found[0].items()} if found else {}


def write_result(
    request: CompareRequest, lines: dict[int | None, list[ArmLine]], found: Found | None, screen: Screen
) -> None:
    """Write the tables as JSON and Markdown, and print them with the conclusions in words, which are about the largest
    budget."""
    output, options, (*others, last) = request.output, request.options, lines
    seeds = list(map(int, options.seeds))
    said = sentences(lines[last], seeds) + budget_sentences({steps: lines[steps] for steps in others})
    if others:
        said.insert(0, f"The verdicts are those at the largest budget, {counted(last or 0, 'optimizer step')}.")
    content: dict[str, Any] = {"seeds": seeds, "settings": request.settings, **as_json(lines[last], said)}
    text = ""
    if found is not None:
        said = grid_sentences(options, found) + said
        content |= {"sentences": said, "search": grid_json(options, found)}
        text += grid_markdown(options, found) + "\n"
        screen.say(grid_table(options, found))
    if options.budgets:
        content["budgets"] = [{"steps": steps, "arms": lines_json(lines[steps])} for steps in lines]
    for steps in lines:
        title = "" if steps is None else f"after {counted(steps, 'optimizer step')}: "
        screen.say(as_table(lines[steps], title))
        text += (f"## {counted(steps, 'optimizer step')}\n\n" if steps is not None else "") + as_markdown(
            lines[steps], said if steps == last else []
        )
    write_json(output / COMPARISON, content)
    (output / "compare.md").write_text(text, encoding="utf-8")
    for sentence in said:
        screen.say(sentence)
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
    more = {name: list(dict.fromkeys([*before.get(name, []), *now[name]])) for name in CAN_GROW}
    return {**now, **more, "evaluation": now["evaluation"] or before["evaluation"]}
