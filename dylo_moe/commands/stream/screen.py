"""What a stream prints: where it begins, what each stage decides, and what to type next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dylo_moe.commands.stream.context import StreamContext
from dylo_moe.commands.stream.data import Roles, StageData
from dylo_moe.commands.stream.state import StreamState
from dylo_moe.continual.config import REPORTED
from dylo_moe.continual.growth import SkillDecision
from dylo_moe.data.loading import LoadedData
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.pages import write_report
from dylo_moe.report.skill_pairs import show_confusable
from dylo_moe.report.terminal import show_rows
from dylo_moe.training.fit import command
from dylo_moe.training.run_folder import shows_training
from dylo_moe.utils import distributed
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table
from dylo_moe.utils.words import counted, listed

MAX_PAIRS = 3
"""The most skills that a stage's skill is said to be like; `dylora experts list` shows all."""


def show_stream_data(screen: Screen, data: LoadedData, roles: Roles) -> None:
    """Print how every row was used, what is learned of each dataset, and what the others are for.

    The datasets are not mixed, so that none has a share of an epoch.
    """
    show_rows(screen, data)
    table = Table("what is learned, in rows and in trained tokens of one epoch", ["dataset", "rows", "tokens"])
    for share in data.shares:
        if share.name in roles.learned:
            table.add_row(share.name, f"{share.rows:,}", f"{share.tokens:,}")
    screen.say(table)
    for names, purpose in (
        (roles.measured, "only measured"),
        (roles.known, "what the experts of the checkpoint already know"),
        (roles.base, "what the base already knows"),
    ):
        if names:
            screen.say(f"{', '.join(names)}: {purpose}, and not trained")
    for note in data.notes:
        screen.note(note)


def show_begin(context: StreamContext, state: StreamState, checkpoint: Path | None, *, num_stages: int) -> None:
    """Print what the stream resumes or starts from, and how many stages it has."""
    screen, stages = context.screen, counted(num_stages, "stage")
    if checkpoint is not None:
        verb = "is" if state.num_done == 1 else "are"
        screen.say(f"resuming from {checkpoint}: {state.num_done} of {stages} {verb} done")
    elif context.request.stream.checkpoint is not None:
        screen.say(f"starting from {context.request.stream.checkpoint}")
    screen.say(f"{stages}, in {context.folder}")


def show_changes(context: StreamContext, changes: Sequence[int]) -> None:
    """Print at which rows of a stream in chunks another kind of text begins."""
    if changes:
        rows = listed([f"{position + 1:,}" for position in changes])
        context.screen.say(f"Another kind of text begins at row {rows}, as the detector finds; a chunk ends there.")


def show_stage(context: StreamContext, number: int, stage: StageData) -> None:
    """Print the heading of a stage."""
    context.screen.rule(f"stage {number}: {stage.name}, {counted(len(stage.rows), 'row')}")


def show_decision(context: StreamContext, stage: StageData, decision: SkillDecision) -> None:
    """Print why the data of a stage is new or known, and what follows from that."""
    seen = min(len(stage.rows), context.request.stream.skill_examples)
    text = f"{decision.in_words(stage.name)} This was decided from {seen:,} of {counted(len(stage.rows), 'row')}."
    lost = decision.lost_too_much(context.request.growth)
    if lost:
        shares = listed([f"{name} {(decision.lost or {})[name]:.1%}" for name in lost])
        text += (
            f" This growth takes tokens of known skills from their experts, as estimated from the library: {shares}. "
            "A deeper --router_layer tells skills with the same words apart; --max_lost_share is what warns."
        )
    if decision.action == REPORTED:
        text += " --learn_with EXPERT names the expert to train on it."
    say = context.screen.warn if lost or decision.expert is None else context.screen.say
    say(text)


def show_unseparated(context: StreamContext, model: DyLoRAMoE, decision: SkillDecision) -> None:
    """Print which skills of other experts the skill of a stage cannot be told from, if it was learned."""
    if decision.expert is not None and model.growth is not None:
        pairs = model.growth.confusable(of=decision.skill)
        show_confusable(context.screen, pairs, context.folder, most=MAX_PAIRS)


def show_end(context: StreamContext, final: Path, seconds: float) -> None:
    """Write the report, and print the files of the stream and what to type next."""
    if not distributed.is_first():
        return
    page = write_report(str(context.folder))
    screen = context.screen
    screen.rule()
    screen.result("checkpoint", final)
    screen.file("matrix", context.folder / "matrix.json")
    screen.file("page", page)
    screen.say(f"The whole stream took {seconds:.0f} s.\n\nTeach it more:\n")
    screen.copyable(f"  {command()} stream --checkpoint {final} --datasets NAME\n")


def how_to_resume(folder: Path) -> str:
    """Say what to type to resume an interrupted stream."""
    if distributed.num_ranks() > 1:
        return f"resume with the same launcher and: -m dylo_moe.cli stream --resume_from_checkpoint {folder}"
    return f"resume with: {command()} stream --resume_from_checkpoint {folder}"


def lost_process(folder: Path) -> str:
    """The message of a stream that ends because one of its processes is gone: how to resume it."""
    if not shows_training(folder):
        return "another process of this stream has gone; nothing was trained yet: start it again"
    return f"another process of this stream has gone; {how_to_resume(folder)}"
