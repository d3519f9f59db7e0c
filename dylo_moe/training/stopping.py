"""When a run ends before its last step: a signal, or held-out losses that no longer fall."""

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
    """Hears SIGTERM and SIGINT while it is entered (`with`), in the main thread.

    In training the running optimizer step is finished, the Trainer saves and ends; an evaluation is left at its next
    batch. Anywhere else the program is left at once. A second signal always leaves at once.

    A signal may reach one rank a step before another. So each of these points is one where the ranks agree: what one
    has heard, all act upon.

    Raises:
        Stopped: where the run is left.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that all ranks act upon."""
        self.is_training = False
        self._heard = 0
        self._is_leaving = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        except ValueError:  # only the main thread may; elsewhere nobody sends us signals
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
        """All ranks take up what any has heard."""
        self.number = largest(self._heard) or None

    def leave(self) -> None:
        """The program ends, with something to tell: from here on no signal cuts it, for a launcher stops all ranks as
        soon as one has gone."""
        self._is_leaving = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on a signal waits for the end of the step."""
        self.is_training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on it does not; what was heard by now counts."""
        self.is_training = False
        self.agree()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if asked."""
        self.agree()
        if self.number is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All is saved already, and there is no time for an evaluation."""
        if self.number is not None:
            control.should_evaluate = control.should_save = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the evaluation, if asked."""
        self.agree()
        if self.number is not None:
            raise Stopped(self.number)


def is_exhausted(losses: Sequence[float], *, patience: int, threshold: float) -> bool:
    """Whether the last `patience` of some losses, in order, all failed to beat the best before them by `threshold`."""
    best, failures = float("inf"), 0
    for loss in losses:
        if loss < best - threshold:
            best, failures = loss, 0
        else:
            failures += 1
    return failures >= patience


class EarlyStopping(TrainerCallback):
    """Ends training when `eval_loss` has not fallen for some evaluations; it remembers nothing but the run's own log.

    Args:
        patience: evaluations without improvement, at least 1.
        threshold: what counts as one, in nats.
    """

    def __init__(self, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold

    def says_stop(self, history: Sequence[dict[str, Any]]) -> bool:
        """Whether a Trainer's `log_history` is reason enough."""
        losses = [line["eval_loss"] for line in history if "eval_loss" in line]
        return is_exhausted(losses, patience=self.patience, threshold=self.threshold)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After an evaluation of everything."""
        if logs and "eval_loss" in logs and self.says_stop(state.log_history):
            control.should_training_stop = True
