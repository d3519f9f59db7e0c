"""End a stage of a stream early, by rows of its own that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset

from dylo_moe.training.stopping import EarlyStopping, is_exhausted
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.words import counted

if TYPE_CHECKING:
    from dylo_moe.commands.stream.stage_trainer import StageTrainer

SHARE, FEWEST_ROWS = 0.1, 4
"""The share of a stage's training rows that is not trained but decides when it ends, and the fewest rows, of which at
most half of the stage's are taken."""


class Outcome(NamedTuple):
    """What the evaluations of a stage so far decide."""

    switch_step: int
    """The step at which consolidation began or will begin."""
    is_over: bool


def split_rows(rows: Dataset, stage: str) -> tuple[Dataset, Dataset]:
    """Split the training rows of a stage into those that are trained and those that decide when it ends.

    The latter are spaced evenly, so that a chunk gives rows of every dataset that it holds; the order of a dataset's
    rows is a random one that follows from the seed.

    Args:
        stage: its name, for the message.

    Raises:
        ValueError: for fewer than two rows.
    """
    count = min(max(FEWEST_ROWS, round(SHARE * len(rows))), len(rows) // 2)
    if count == 0:
        raise ValueError(
            f"early_stopping_patience needs a row to keep back, and {stage} has {counted(len(rows), 'training row')}: "
            "give it at least two, or leave early_stopping_patience out"
        )
    places = (2 * np.arange(count) + 1) * len(rows) // (2 * count)
    return rows.select(np.setdiff1d(np.arange(len(rows)), places)), rows.select(places)


def outcome(history: Sequence[dict[str, Any]], *, planned_switch: int, patience: int, threshold: float) -> Outcome:
    """Decide from all evaluations of a stage when consolidation begins, and whether the stage is over.

    While a new expert is seeded at the high rate, exhausted patience begins its consolidation. The patience of that
    counts anew; where it is exhausted too, the stage is over.

    Args:
        history: the Trainer's `log_history`.
        planned_switch: the step at which consolidation begins at the latest.
        patience, threshold: as of `EarlyStopping`.
    """
    losses = [(line["step"], line["eval_loss"]) for line in history if "eval_loss" in line]
    seeding = [item for item in losses if item[0] <= planned_switch]
    switch = planned_switch
    for count in range(1, len(seeding) + 1):
        if is_exhausted([loss for _, loss in seeding[:count]], patience=patience, threshold=threshold):
            switch = seeding[count - 1][0]
            break
    later = [loss for step, loss in losses if step > switch]
    return Outcome(switch, is_exhausted(later, patience=patience, threshold=threshold))


class StageStopping(EarlyStopping):
    """Begins the consolidation of a stage, or ends it, when the loss of its kept-back rows has not fallen.

    Like `EarlyStopping` it keeps no state of its own.

    Args:
        screen: where a change is told.
        patience, threshold: as of `EarlyStopping`.
    """

    trainer: StageTrainer
    """The trainer of the stage, which is given once it is made."""

    def __init__(self, patience: int, threshold: float, *, screen: Screen) -> None:
        super().__init__(patience, threshold)
        self.screen = screen

    def _outcome(self, history: Sequence[dict[str, Any]]) -> Outcome:
        planned = self.trainer.planned_switch(self.trainer.state.max_steps or self.trainer.total_steps)
        return outcome(history, planned_switch=planned, patience=self.patience, threshold=self.threshold)

    def says_stop(self, history: Sequence[dict[str, Any]]) -> bool:
        """Whether the stage is over, given the Trainer's `log_history`."""
        return self._outcome(history).is_over

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate after the last step too, and log the training losses with every evaluation."""
        control.should_evaluate |= state.global_step >= state.max_steps
        control.should_log |= control.should_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Decide after an evaluation."""
        if not logs or "eval_loss" not in logs:
            return
        found, step = self._outcome(state.log_history), state.global_step
        if found.is_over:
            control.should_training_stop = True
        elif found.switch_step == step < self.trainer.switch_step:
            self.trainer.begin_consolidation()
            self.screen.say(
                f"step {step}: the loss of the rows kept back has not fallen for "
                f"{counted(self.patience, 'evaluation')}, so consolidation at the low rate begins now"
            )

    def say_end(self) -> None:
        """Print where the stage ended, and which weights are kept."""
        state, best = self.trainer.state, self.trainer.best
        if best is None:
            return
        is_early = state.global_step < state.max_steps
        ended = f"ended early at step {state.global_step} of {state.max_steps}; " if is_early else ""
        self.screen.say(
            f"{ended}the weights of step {best.step} are kept: there the rows kept back have loss {best.loss:.4f}"
        )
