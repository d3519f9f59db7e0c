"""What ends a run before its last step: a signal, or held-out losses that no longer fall."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from dylo_moe.utils.distributed import largest
from dylo_moe.utils.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest(TrainerCallback):
    """Handles SIGTERM and SIGINT within its `with` block, in the main thread.

    During training the running optimizer step is finished, then the Trainer saves and ends; an evaluation ends at its
    next batch. Anywhere else the program ends at once, and a second signal always ends it at once.

    A signal may reach one rank a step before another. So the ranks agree at each of these points, and all of them act
    on a signal that any of them has received.

    Raises:
        Stopped: where the run ends.

    Args:
        finishes_evaluations: whether an evaluation during training is finished after a signal, because its result
            decides how the training goes on; the signal then takes effect at the end of the next step.
    """

    def __init__(self, *, finishes_evaluations: bool = False) -> None:
        self.finishes_evaluations = finishes_evaluations
        self.number: int | None = None
        """The signal that all ranks act on; None: there is none."""
        self.is_training = False
        self._heard = 0
        self._is_leaving = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        except ValueError:  # Python delivers signals to the main thread only, and only it may set handlers
            self._before = {}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_leaving:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._is_leaving:
            return
        again, self._heard = self._heard != 0, number
        if again or not self.is_training:
            self.number = number
            raise Stopped(number)

    def agree(self) -> None:
        """Make all ranks act on a signal that any of them has received."""
        self.number = largest(self._heard) or None

    def leave(self) -> None:
        """Ignore signals from here on, so that this rank can still print why the program ends: a launcher stops all
        ranks as soon as one has gone."""
        self._is_leaving = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let a signal take effect at the end of the running step."""
        self.is_training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let a signal end the program at once again; the ranks agree on a signal received until now."""
        self.is_training = False
        self.agree()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop after a signal."""
        self.agree()
        if self.number is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Skip the evaluation after a signal, for which there is no time; the last step saved everything."""
        if self.number is not None:
            control.should_evaluate = control.should_save = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the evaluation after a signal."""
        if self.is_training and self.finishes_evaluations:
            return
        self.agree()
        if self.number is not None:
            raise Stopped(self.number)


def is_exhausted(losses: Sequence[float], *, patience: int, threshold: float) -> bool:
    """Whether each of the last `patience` losses failed to fall below the best one before it by `threshold`."""
    best, failures = float("inf"), 0
    for loss in losses:
        if loss < best - threshold:
            best, failures = loss, 0
        else:
            failures += 1
    return failures >= patience


class EarlyStopping(TrainerCallback):
    """Ends training when `eval_loss` has not fallen for some evaluations.

    It reads the run's own log and keeps no state, so that a resumed run stops where an uninterrupted one would.

    Args:
        patience: evaluations without improvement, at least 1.
        threshold: by how much the loss must fall to count as an improvement, in nats.
    """

    def __init__(self, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold

    def says_stop(self, history: Sequence[dict[str, Any]]) -> bool:
        """Whether training should end, given the Trainer's `log_history`."""
        losses = [line["eval_loss"] for line in history if "eval_loss" in line]
        return is_exhausted(losses, patience=self.patience, threshold=self.threshold)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Decide after an evaluation of all datasets, which alone logs `eval_loss`."""
        if logs and "eval_loss" in logs and self.says_stop(state.log_history):
            control.should_training_stop = True
