"""One training, from its first or resumed step to its end."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerState

from dylo_moe.model.checkpoint import CheckpointError
from dylo_moe.training.callbacks import MetricsFile, ProgressBar
from dylo_moe.training.metrics import MeterReading
from dylo_moe.training.run_folder import checkpoint_name, shows_training
from dylo_moe.training.saved_state import read_trainer_state
from dylo_moe.training.stopping import EarlyStopping, StopRequest
from dylo_moe.training.tracking import end_tracking
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils import distributed
from dylo_moe.utils.errors import Stopped
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.words import counted


def how_to_resume(folder: Path) -> str:
    """What to type to resume the run in a folder."""
    how = f"with: {command()} train" if distributed.num_ranks() == 1 else "with the same launcher and: train.py"
    return f"Resume {how} --resume_from_checkpoint {folder}"


def command() -> str:
    """How to call this very installation: by its name where the shell finds it under that, else by its path."""
    beside, found = Path(sys.executable).with_name("dylora"), shutil.which("dylora")
    if found and Path(found).resolve() == beside.resolve():
        return "dylora"
    return os.path.relpath(beside) if beside.exists() else f"{sys.executable} -m dylo_moe.cli"


def resume_log(screen: Screen, metrics: MetricsFile, checkpoint: Path | None) -> TrainerState | None:
    """Cut metrics.jsonl back to the step that training begins at.

    Returns:
        The Trainer's state at that step; None at the very beginning.
    """
    if checkpoint is None:
        if distributed.is_first():
            metrics.path.unlink(missing_ok=True)  # left by a run that was killed before its first checkpoint
        return None
    state = read_trainer_state(checkpoint)
    if not distributed.is_first():
        return state
    dropped = metrics.rewind(state.log_history)
    if dropped:
        lines = counted(dropped, "line of metrics.jsonl is", "lines of metrics.jsonl are")
        screen.say(f"{lines} newer than the checkpoint, and will be logged again")
    return state


def train_to_end(
    trainer: DyLoRATrainer, stop: StopRequest, checkpoint: Path | None, state: TrainerState | None
) -> None:
    """Train to the end, or until a signal asks to stop; what was trained by then is saved.

    Args:
        checkpoint: what to resume from; None: nothing.
        state: the Trainer's state in that checkpoint.

    Raises:
        Stopped: with how to resume.
    """
    if checkpoint is not None and state is not None and is_over(trainer, state):
        trainer.take_up(checkpoint, state)
        return
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Stopped:
        trainer.save_now()
    except (pickle.UnpicklingError, EOFError) as error:  # optimizer and random states, which the Trainer reads
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint} has a file of the Trainer that cannot be read: {said}") from error
    finally:
        progress_bar(trainer).stop()
    if stop.number is not None:
        folder = Path(str(trainer.args.output_dir))
        raise Stopped(
            stop.number,
            f"saved {folder / checkpoint_name(trainer.state.global_step)}. {how_to_resume(folder)}",
        )


def is_over(trainer: DyLoRATrainer, state: TrainerState) -> bool:
    """Whether a training with this state has no step left."""
    early = next((item for item in trainer.callback_handler.callbacks if isinstance(item, EarlyStopping)), None)
    return state.global_step >= trainer.total_steps or (early is not None and early.says_stop(state.log_history))


def evaluate(trainer: DyLoRATrainer, when: str) -> dict[str, MeterReading]:
    """Evaluate every dataset; what is shown says when this is, and how far it is."""
    with progress_bar(trainer).evaluating(f"evaluating {when}"):
        trainer.evaluate()
    return dict(trainer.readings)


def progress_bar(trainer: DyLoRATrainer) -> ProgressBar:
    """The callback that shows how far the trainer is."""
    return next(item for item in trainer.callback_handler.callbacks if isinstance(item, ProgressBar))


@contextmanager
def removed_unless_trained(run: Path, *, is_new: bool) -> Iterator[None]:
    """Remove the folder of a run that ends with an error or a signal before anything is trained, so that the same
    command can be typed again.

    Args:
        is_new: whether this process made the folder; another one's is left as it is.
    """
    try:
        yield
    except BaseException:
        if is_new and distributed.is_first() and not shows_training(run):
            end_tracking()
            shutil.rmtree(run, ignore_errors=True)
        raise
