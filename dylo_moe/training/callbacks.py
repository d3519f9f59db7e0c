"""What a run shows while it trains: a live bar on a terminal or plain lines elsewhere, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from dylo_moe.training.trainer_arguments import text_of
from dylo_moe.utils.atomic_files import write_whole
from dylo_moe.utils.screen import SECONDS_BETWEEN_LINES, Screen
from dylo_moe.utils.words import counted


class MetricsFile(TrainerCallback):
    """Appends every log of the Trainer to a file, one JSON object a line, with step, epoch and time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, history: list[dict[str, Any]]) -> int:
        """Cut the file back to a checkpoint; what the run logged after it is logged again when the run is resumed.

        Args:
            history: the Trainer's `log_history` in the checkpoint; it replaces a file that holds less.

        Returns:
            How many lines were dropped.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        left, kept = len(history), []
        for line in lines:
            try:
                values = json.loads(line)
            except ValueError:  # a line that a kill has cut off
                break
            if values["step"] > 0 and "alarms" not in values:
                left -= 1
            if left < 0:
                break
            kept.append(line)
        if left > 0:
            kept = [json.dumps(values, default=float) for values in history]
        write_whole(self.path, "".join(f"{line}\n" for line in kept).encode())
        return max(len(lines) - len(kept), 0)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line: the step, the time and the values."""
        line = {"step": step, "time": round(time.time(), 3), **values}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=float) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a log of the Trainer; a value that is not finite becomes null, for JSON has no other word for it."""
        if not state.is_world_process_zero or logs is None:
            return
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in logs.items()
        }
        self.write(state.global_step, values)


class ProgressBar(TrainerCallback):
    """Shows the step, the losses, the router's entropy, tokens per second and the time that is left.

    Args:
        num_batches: the batches of one evaluation; 0: the training has none.
    """

    def __init__(self, screen: Screen, *, num_batches: int = 0) -> None:
        self.screen, self.num_batches = screen, num_batches
        self.progress: Progress | None = None
        self.task: Any = None
        self.started, self.start_step = 0.0, 0
        self.evaluation_seconds = 0.0
        """How long the last evaluation of all datasets took."""
        self._advance: Callable[[int], None] | None = None
        self._evaluating_since, self._batches_done, self._said_at, self._paused = 0.0, 0, 0.0, 0.0

    @contextmanager
    def evaluating(self, title: str) -> Iterator[None]:
        """Show how far an evaluation is that stands before or after the training."""
        self._batches_done = 0
        with self.screen.counting(title, self.num_batches) as self._advance:
            yield
        self._advance = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self.started = self._said_at = time.time()
        self.start_step, self._paused, self._batches_done = state.global_step, 0.0, 0
        if not state.is_world_process_zero or not self.screen.is_live:
            return
        columns = [
            TextColumn("training"),
            BarColumn(bar_width=10 if self.screen.is_narrow else 20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        self.progress = Progress(*columns, console=self.screen.console)
        self.task = self.progress.add_task("training", total=state.max_steps, note="", completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar; elsewhere a step that comes long after the last line gets a line of its own."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)
            return
        is_due = time.time() - self._said_at >= SECONDS_BETWEEN_LINES and not control.should_log  # a log has its line
        if state.is_world_process_zero and is_due:
            self._say(args, state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show how far an evaluation is, and measure how long it takes."""
        if self.num_batches == 0:
            return
        if self._batches_done == 0:
            self._evaluating_since = time.time()
        self._batches_done += 1
        if self._advance is not None:
            self._advance(1)
        elif state.is_world_process_zero:
            self._say_evaluating(f"evaluating: batch {self._batches_done} of {self.num_batches}")
        if self._batches_done >= self.num_batches:
            self._batches_done = 0
            self.evaluation_seconds = time.time() - self._evaluating_since
            self._paused += 0.0 if self._advance is not None else self.evaluation_seconds

    def _say_evaluating(self, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.task, note=text)
        elif time.time() - self._said_at >= SECONDS_BETWEEN_LINES:
            self._said_at = time.time()
            self.screen.progress(text)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the newest training losses."""
        if not state.is_world_process_zero or logs is None or "lm_loss" not in logs:
            return
        loss, speed = f"loss {logs['lm_loss']:.3f}", f"{logs['tokens_per_second']:,.0f} tokens/s"
        # Both are exactly zero where every token is routed to one given expert, as in a stage of a stream.
        routing = [
            f"{word} {logs[name]:.2f}"
            for word, name in (("balance", "balance_loss"), ("entropy", "token_entropy"))
            if logs[name] != 0
        ]
        note = ", ".join([loss, *routing, speed])
        if self.progress is not None:
            self.progress.update(self.task, note=f"{loss}, {speed}" if self.screen.is_narrow else note)
        self._say(args, state, f"{note}  ")

    def _say(self, args: Any, state: Any, note: str = "") -> None:
        self._said_at, elapsed = time.time(), time.time() - self.started
        self.screen.progress(
            f"step {state.global_step}/{state.max_steps}  {note}{elapsed:.0f} s, {self._left(args, state)}"
        )

    def _left(self, args: Any, state: Any) -> str:
        """How long the steps and the evaluations that are left will take, if they take as long as those before."""
        done = max(state.global_step - self.start_step, 1)
        a_step = max(time.time() - self.started - self._paused, 0.0) / done
        evaluations = evaluations_left(args, state) if self.num_batches else 0
        seconds = a_step * (state.max_steps - state.global_step) + self.evaluation_seconds * evaluations
        is_measured = self.evaluation_seconds > 0 or evaluations == 0  # a resumed run has no evaluation at its start
        return f"about {seconds:.0f} s left" + ("" if is_measured else f" and {counted(evaluations, 'evaluation')}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.stop()

    def stop(self) -> None:
        """Stop the bar, however the training ended."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def evaluations_left(args: Any, state: Any) -> int:
    """How many evaluations a training has still to make, the one after its last step among them."""
    strategy = text_of(args.eval_strategy)
    last, now = (state.max_steps, state.global_step) if strategy == "steps" else (state.num_train_epochs, state.epoch)
    every = state.eval_steps if strategy == "steps" else 1
    if strategy == "no":
        return 1
    # A log is written before the evaluation of its step; the last one comes at the end, even if that is no multiple.
    passed = max(math.ceil((now or 0) / every) - 1, math.ceil(args.eval_delay / every) - 1, 0)
    return 1 + max(math.ceil(last / every) - passed, 0)
