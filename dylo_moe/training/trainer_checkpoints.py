"""The checkpoints of a training run: when they are saved, what they hold, which are deleted, and how training resumes.

`CheckpointingTrainer` overrides three private methods of `transformers.Trainer`. Each says why no public one serves,
and tests/training/test_trainer_private.py fails when Transformers changes what it relies on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from dylo_moe.model.checkpoint import CheckpointError
from dylo_moe.model.loading import load_into
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.model.saving import check_finite, save_tensors, write_files
from dylo_moe.training.metrics import MeterReading
from dylo_moe.training.resume import trainable_set
from dylo_moe.training.run_folder import GATE_START_FILE, checkpoint_name, checkpoints_in, discard, unfinished
from dylo_moe.utils.distributed import is_lost_peer
from dylo_moe.utils.whole_folders import replace_folder
from dylo_moe.utils.write_errors import why_not_saved


class SavePoints(TrainerCallback):
    """Decides when a checkpoint is saved, and keeps the Trainer from deleting any.

    A save that falls on the end of an epoch or of the training waits for the evaluation there, and the training losses
    are logged with every save: so a resumed run repeats or lacks no line of the log.

    Args:
        limit: `save_total_limit`. It is hidden from the Trainer while it trains, because at a limit of 1 that deletes
            the newest checkpoint at the end of a training whose best one is older.
        delete_oldest: deletes the checkpoints beyond the limit, which a kill between a save and that has left.
    """

    def __init__(self, limit: int | None, delete_oldest: Callable[[], object]) -> None:
        self.limit = limit
        self.delete_oldest = delete_oldest
        self.is_put_off = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hide the limit, after the trackers have recorded it with the other arguments, and keep to it."""
        args.save_total_limit = None
        if args.should_save:
            self.delete_oldest()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the limit again."""
        args.save_total_limit = self.limit

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put a save off until the end of the epoch is evaluated, or log the losses with it."""
        if control.should_save and (float(state.epoch).is_integer() or control.should_training_stop):
            self.is_put_off, control.should_save = True, False
        control.should_log |= control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the save that was put off."""
        control.should_save |= self.is_put_off
        control.should_log |= control.should_save
        self.is_put_off = False


class CheckpointingTrainer(Trainer):
    """`transformers.Trainer` for a `DyLoRAMoE` model, with atomic checkpoints that hold no pickled weights.

    A checkpoint is the folder that `DyLoRAMoE.save_pretrained` writes, with the Trainer's own state beside the weights
    and the hash of every file in the manifest. It is written under a hidden name and renamed once it is complete, so
    that a kill at any moment leaves only complete checkpoints. Training that resumes from one ends bit-equal to
    training that was never interrupted.

    Args:
        training: what the checkpoints' manifests hold besides the step; kept as `training`.
        others: as for `transformers.Trainer`.

    Raises:
        ValueError: for `push_to_hub`; a checkpoint folder is uploaded with the `hf` command.
    """

    def __init__(self, *args: Any, training: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.training = {} if training is None else training
        self.save_points = SavePoints(
            self.args.save_total_limit, lambda: self._delete_oldest(Path(str(self.args.output_dir)))
        )
        self.add_callback(self.save_points)
        self.readings: dict[str, MeterReading] = {}
        """What the newest evaluation found, by dataset."""
        self.gate_start: dict[str, Tensor] | None = None
        """The gate rows with which the whole training began; None before its first step."""
        self.paused_seconds = 0.0
        """Time since the last training log that was not spent on training."""

    def own_model(self) -> DyLoRAMoE:
        """The model without anything that wraps it."""
        model = self.model if isinstance(self.model, DyLoRAMoE) else self.accelerator.unwrap_model(self.model)
        return cast(DyLoRAMoE, model)

    def gate_rows(self) -> dict[str, Tensor]:
        """A copy of every gate row, fp32 on the CPU."""
        return {name: row.detach().float().cpu().clone() for name, row in self.own_model().router.gate.items()}

    def pause(self, seconds: float) -> None:
        """Leave some seconds out of the training's tokens per second."""
        self.paused_seconds += seconds

    # Saving.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `DyLoRAMoE.save_pretrained` does; the Trainer would pickle its arguments beside it.

        Within a checkpoint (`_internal_call`) it saves nothing: there the model is written last, for its manifest holds
        the hashes of all other files.
        """
        if self.args.should_save and not _internal_call:
            self.own_model().save_pretrained(str(output_dir or self.args.output_dir))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse an upload, whose files the Trainer would gather before the checkpoint is complete."""
        raise ValueError("this Trainer uploads nothing to the hub; upload a checkpoint folder with the `hf` command")

    def save_now(self) -> None:
        """Save a checkpoint of the present step, unless there is one."""
        if not (Path(str(self.args.output_dir)) / checkpoint_name(self.state.global_step)).is_dir():
            self._save_checkpoint(cast(nn.Module, self.model), None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint atomically, all ranks together.

        Why this private method is overridden: the Trainer's own writes straight into the final folder, so that a kill
        leaves an incomplete checkpoint under a valid name, and no public hook surrounds it. It still writes the state
        of optimizer, schedule, gradient scaler and random generators, into a hidden folder.

        Raises:
            CheckpointError: where it cannot be written; what was there before stays as it was.
            ValueError: for weights with NaN or infinity.
        """
        started = time.monotonic()
        self.own_model().router.collect_counts()
        folder = Path(str(self.args.output_dir))
        target = folder / checkpoint_name(self.state.global_step)
        hidden = unfinished(target)
        aside = hidden / target.name
        check_finite(self.own_model(), target)
        try:
            if self.args.should_save:
                shutil.rmtree(hidden, ignore_errors=True)
                aside.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            with self._saving_into(hidden):
                super()._save_checkpoint(model, trial)
            self._find_best(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._complete(aside)
                replace_folder(aside, target)
                shutil.rmtree(hidden)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: torch.save on a full disk
            if is_lost_peer(error):
                raise
            if self.args.should_save:
                shutil.rmtree(hidden, ignore_errors=True)
            raise CheckpointError(cannot_save(target, error)) from error
        if self.args.should_save:
            self._delete_oldest(folder)
        self.accelerator.wait_for_everyone()
        self.pause(time.monotonic() - started)

    @contextmanager
    def _saving_into(self, folder: Path) -> Iterator[None]:
        """Have the Trainer save into another folder than the run's."""
        before, self.args.output_dir = self.args.output_dir, str(folder)
        try:
            yield
        finally:
            self.args.output_dir = before

    def _find_best(self, folder: Path) -> None:
        """Name the best checkpoint by its final path, where it is one that was saved."""
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (folder / checkpoint_name(best)).is_dir()):
            self.state.best_model_checkpoint = str(folder / checkpoint_name(best))

    def _complete(self, aside: Path) -> None:
        """Add to the Trainer's state what is ours; the manifest with every file's hash comes last."""
        self.state.save_to_json(str(aside / "trainer_state.json"))
        save_tensors(self.gate_start or self.gate_rows(), aside / GATE_START_FILE)
        after = {name: reading.loss for name, reading in self.readings.items()}
        known = {"before": self.training.get("losses_before", {}), "after": after}
        write_files(self.own_model(), aside, training=self.checkpoint_record(), losses=known if after else None)

    def checkpoint_record(self) -> dict[str, Any]:
        """What the manifest of a checkpoint says of the training."""
        return {
            **self.training,
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "world_size": self.args.world_size,
            "trainable": trainable_set(self.own_model()),
        }

    def _delete_oldest(self, folder: Path) -> None:
        """Delete the oldest checkpoints beyond the limit, but neither the newest nor the best."""
        limit = self.save_points.limit
        if limit is None or limit < 1:
            return
        found = [path for _, path in checkpoints_in(folder)]
        best = Path(self.state.best_model_checkpoint).name if self.state.best_model_checkpoint else None
        spare = [path for path in found[:-1] if path.name != best]
        for path in spare[: max(len(found) - limit, 0)]:
            discard(path)

    # Loading.

    def load_weights(self, folder: Path) -> dict[str, Any]:
        """Load the weights of a checkpoint; returns its record of the training."""
        record = load_into(self.own_model(), folder).get("training", {})
        if (folder / GATE_START_FILE).is_file():
            self.gate_start = load_file(folder / GATE_START_FILE)
        return record

    def take_up(self, folder: Path, state: TrainerState) -> None:
        """Load the weights and state of a checkpoint whose training is over."""
        self.load_weights(folder)
        self.state = state
        if self.args.should_save:
            self._delete_oldest(folder.parent)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights that training resumes from, and check that the optimizer's saved state belongs to them.

        Why this private method is overridden: the Trainer's own looks for a single adapter or a whole model in PEFT's
        and Transformers' layouts, and no public method loads the weights within `train`. It is called before the
        Trainer loads the optimizer, whose state PyTorch recognises by the number of parameters only.

        Raises:
            CheckpointError: for a checkpoint that is incomplete or does not fit, or that trained other parameters.
        """
        saved = self.load_weights(Path(resume_from_checkpoint)).get("trainable")
        here = trainable_set(self.own_model())
        if saved != here:
            order = ", under other names or in another order" if saved and saved["text"] == here["text"] else ""
            raise CheckpointError(
                f"the optimizer of {resume_from_checkpoint} cannot be resumed: it trained {saved and saved['text']}, "
                f"here {here['text']} would be trained{order}"
            )

    def _load_best_model(self) -> None:
        """Load the best checkpoint at the end of the training.

        Why this private method is overridden: as for `_load_from_checkpoint`; the Trainer's own finds no weights that
        it knows, warns, and leaves the last ones in place.
        """
        load_into(self.own_model(), str(self.state.best_model_checkpoint))


def cannot_save(target: Path, error: Exception) -> str:
    """The message for a checkpoint that cannot be written: why, how much room is left, and which one is the newest."""
    complete = [path.name for _, path in checkpoints_in(target.parent)]
    left = f"the last whole checkpoint is {complete[-1]}" if complete else "there is no earlier checkpoint"
    return f"cannot save {target}: {why_not_saved(target, error)}. Nothing of it was kept; {left}"
