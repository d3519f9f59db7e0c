"""What a run tells while it trains: a live bar on a terminal, plain lines in a file, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class MetricsFile(TrainerCallback):
    """Appends every log of the Trainer to a file, one JSON object a line, with step, epoch and time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line; a value that is not finite becomes null, so that the line stays JSON."""
        if not state.is_world_process_zero or logs is None:
            return
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in logs.items()
        }
        line = {"step": state.global_step, "time": round(time.time(), 3), **values}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=float) + "\n")


class ProgressBar(TrainerCallback):
    """Step, loss, certainty of the router and time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.task: Any = None
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self.started = time.time()
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = [
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        self.progress = Progress(*columns, console=self.console)
        self.task = self.progress.add_task("training", total=state.max_steps, note="", completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the newest training losses."""
        if not state.is_world_process_zero or logs is None or "lm_loss" not in logs:
            return
        note = f"loss {logs['lm_loss']:.3f}, balance {logs['balance_loss']:.2f}, entropy {logs['token_entropy']:.2f}"
        if self.progress is not None:
            self.progress.update(self.task, note=note)
        else:
            elapsed = time.time() - self.started
            left = elapsed / max(state.global_step, 1) * (state.max_steps - state.global_step)
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {note}  {elapsed:.0f} s, about {left:.0f} s left",
                highlight=False,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
