"""The HF Trainer, told what to save and how to go on from it, how to count a step's tokens, and what to log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from dylo_moe.model.checkpoint import CheckpointError
from dylo_moe.model.loading import load_into
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.model.saving import check_finite, write_files
from dylo_moe.training.alarms import AlarmBell, alarms
from dylo_moe.training.metrics import Meter, MeterReading, as_metrics, gate_drift, gradient_norms, token_losses
from dylo_moe.training.resume import trainable_set
from dylo_moe.training.run_folder import GATE_START_FILE, checkpoint_name, checkpoints_in, discard, unfinished
from dylo_moe.training.sharding import average_gradients, is_sharded
from dylo_moe.training.trainer_checkpoints import SavePoints
from dylo_moe.utils.atomic_files import replace_folder
from dylo_moe.utils.distributed import is_lost_peer

Tell = Callable[[int, list[str]], None]


class DyLoRATrainer(Trainer):
    """`transformers.Trainer` for a `DyLoRAMoE` model; with label smoothing, which the stock one does past the model.

    Batches may hold `domain`, int64 [batch] or in packed rows [batch, seq], the position of each row's or token's
    dataset in `domains`; losses and routing are then logged per domain. Evaluation reports the language-model
    loss alone, as a mean over tokens.

    A checkpoint is a folder of ours with the Trainer's state in it, every file listed with its hash; it appears whole
    or not at all. Training that goes on from one ends bit-equal to training that was never interrupted. For that an
    evaluation leaves the random state as it was, a save at the end of an epoch comes after the epoch's evaluation,
    and the training losses are logged with each save.

    Of several evaluation datasets, `eval_loss` is the mean of their losses, each counting alike.

    With `use_liger_kernel` Liger's kernels serve but for its loss, in whose place the model's `loss_chunk_size` does.

    In several processes each optimizer step is that of one process with as many rows: losses, gradients, utilisation
    and balance are over all ranks, and a row that only fills up the last batch of a pass counts for nothing. They train
    under DistributedDataParallel, or, where `shard_base` left each of them a part of the base, as it says.

    Args:
        domains: names of the datasets.
        training: what the checkpoints' manifests shall hold besides the step; kept as `training`.
        tell: called with a step and sentences, when an alarm about the routing begins or ends.
        others: as for `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        domains: list[str],
        training: dict[str, Any] | None = None,
        tell: Tell | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.use_liger_kernel:
            self.args.liger_kernel_config = without_fused_loss(self.args.liger_kernel_config)
        self.add_callback(SavePoints)
        self.training = {} if training is None else training
        self.label_smoother = None  # it would take the labels out of the model's sight; the model smooths itself
        experts = cast(DyLoRAMoE, self.model).router.names
        self.domains = domains
        self.train_meter = Meter(domains, experts)
        self.eval_meter = Meter(domains, experts)
        self.readings: dict[str, MeterReading] = {}
        """The last evaluation's, by dataset."""
        self._balance_sum, self._balance_steps = 0.0, 0
        self._step_tokens: Tensor | None = None
        self._num_parameters: int | None = None
        self._tell, self._bell = tell, AlarmBell()
        self._gradient_norms: dict[str, Tensor] = {}
        self._resumed: dict[str, Any] = {}
        """The record of the checkpoint that training goes on from."""
        self._gate_start: dict[str, Tensor] | None = None
        self._logged_at, self._paused = time.monotonic(), 0.0

    # A step: its batches, its loss, what it did.

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Every order of the rows follows from the seed and the epoch, so that it can be taken up again."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            rows = sampler.batch_size * self.args.world_size  # of a step, however many processes share it
            return EpochLengthGroupedSampler(rows, lengths=sampler.lengths, seed=seed)
        return sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Also counts the real tokens of the whole optimizer step, over all ranks."""
        rows, each = self.train_dataset, self._train_batch_size
        batches = (self._without_repeats(batch, rows, each) for batch in epoch_iterator)
        samples, num_items = super().get_batch_samples(batches, num_batches, device)
        counts = [batch["attention_mask"].sum() for batch in samples if "attention_mask" in batch]
        self._step_tokens = torch.stack(counts).sum().to(device) if len(counts) == len(samples) and counts else None
        if self._step_tokens is not None and self.args.world_size > 1:
            self._step_tokens = self.accelerator.gather(self._step_tokens).sum()
        return samples, num_items

    def _without_repeats(self, batch: dict[str, Any], rows: Any, each: int) -> dict[str, Any]:
        """A batch whose repeated rows are empty.

        At the end of a pass Accelerate gives the ranks rows of its beginning again, so that all have as many; of all
        ranks' rows behind one another, the real ones come first. How many, its own `remainder` tells wrongly where a
        run goes on in the middle of a pass.

        Args:
            rows: of the whole pass.
            each: how many of them a rank takes at once.
        """
        if self.args.world_size == 1 or not self.accelerator.gradient_state.end_of_dataloader:
            return batch
        left = len(rows) % (each * self.args.world_size)
        if left == 0:
            return batch
        real = max(left - each * self.args.process_index, 0)
        labels, mask = batch["labels"].clone(), batch["attention_mask"].clone()
        labels[real:], mask[real:] = -100, 0
        return {**batch, "labels": labels, "attention_mask": mask}

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Of an evaluation, in which each row counts once."""
        rows = cast(Any, self.callback_handler.eval_dataloader).dataset
        inputs = self._without_repeats(inputs, rows, self.args.eval_batch_size)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, counted into the meter."""
        inputs = dict(inputs)
        domain = inputs.pop("domain", None)
        if model.training:
            inputs["label_smoothing"] = self.args.label_smoothing_factor
            if self._step_tokens is not None:
                inputs["num_tokens_in_batch"] = self._step_tokens
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if domain is None:
            domain = torch.zeros(len(inputs["labels"]), dtype=torch.int64)
        meter = self.train_meter if model.training else self.eval_meter
        losses = token_losses(outputs, inputs["labels"])
        meter.add(losses=losses, labels=inputs["labels"], routing=outputs.routing, domain=domain)
        if model.training:
            self._balance_sum += float(outputs.balance_loss.detach())
        else:
            loss = outputs.lm_loss
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Also measures the gradients of a whole step, before they are clipped."""
        if self._gate_start is None:
            self._gate_start = self._gate_rows()
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            if is_sharded(self._own_model()):
                average_gradients(self._own_model())
            self._balance_steps += 1
            scaler = getattr(self.accelerator, "scaler", None)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            self._gradient_norms = gradient_norms(self._own_model(), scale=scale)
        return loss

    def _own_model(self) -> DyLoRAMoE:
        model = self.model if isinstance(self.model, DyLoRAMoE) else self.accelerator.unwrap_model(self.model)
        return cast(DyLoRAMoE, model)

    # What the Trainer does with all parameters at every step must not take longer the more experts are frozen.

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer counts them; the parameters are counted once."""
        if self._num_parameters is None:
            self._num_parameters = int(self._own_model().base.num_parameters(exclude_embeddings=True))
        return 6 * inputs["input_ids"].numel() * self._num_parameters

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._learning(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._learning(model), grad_norm)

    def _learning(self, model: nn.Module) -> Any:
        """What stands for a model where only its parameters are asked for: those that may have a gradient."""
        ours = self._own_model()
        learning = [*ours.experts.learning(), *ours.router.parameters()]
        return SimpleNamespace(parameters=lambda: learning)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Where its base is sharded, all of it is there."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Made here, for Accelerate leaves a model that was evaluated before as it is: its ranks would train apart."""
        wrapped = super()._wrap_model(model, training, dataloader)
        if not training or self.args.world_size == 1 or isinstance(wrapped, (DistributedDataParallel, Whole)):
            return wrapped
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        if is_sharded(model):
            return Whole(model)
        device = self.args.device
        device_ids = None if device.type == "cpu" else [device]
        return DistributedDataParallel(model, device_ids=device_ids, **self.accelerator.ddp_handler.to_kwargs())

    def _gate_rows(self) -> dict[str, Tensor]:
        return {name: row.detach().float().cpu().clone() for name, row in self._own_model().router.gate.items()}

    def _shared(self, meter: Meter) -> MeterReading | None:
        """The meter's reading over all ranks, after which it starts over."""
        if meter.sums is not None and self.args.world_size > 1:
            meter.sums = self.accelerator.reduce(meter.sums, "sum")
        reading = meter.read()
        meter.reset()
        return reading

    def _over_ranks(self, number: float) -> float:
        """The sum of all ranks' numbers."""
        if self.args.world_size == 1:
            return number
        return float(self.accelerator.reduce(torch.tensor(number, device=self.args.device), "sum"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to a training log what the tokens since the last one did."""
        reading = self._shared(self.train_meter) if "loss" in logs else None
        if reading is not None:
            seconds = max(time.monotonic() - self._logged_at - self._paused, 1e-9)
            logs = {
                **logs,
                "lm_loss": reading.loss,
                "balance_loss": self._over_ranks(self._balance_sum) / max(self._balance_steps, 1),
                **as_metrics(reading),
                "tokens_per_second": reading.num_tokens / seconds,
                **{f"grad_norm_{name}": float(norm) for name, norm in self._gradient_norms.items()},
                **{f"gate_drift_{name}": drift for name, drift in self._gate_drift().items()},
            }
            self._balance_sum, self._balance_steps = 0.0, 0
            self._logged_at, self._paused = time.monotonic(), 0.0
        super().log(logs, *args, **kwargs)
        changes = [] if reading is None else self._bell.changes(alarms(reading), reading.num_tokens)
        if changes and self._tell is not None:
            self._tell(self.state.global_step, changes)

    def pause(self, seconds: float) -> None:
        """Take seconds that were none of the training out of its tokens per second."""
        self._paused += seconds

    def _gate_drift(self) -> dict[str, float]:
        return {} if self._gate_start is None else gate_drift(self._gate_start, self._gate_rows())

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; of several datasets with `eval_loss`, the mean of theirs."""
        started = time.monotonic()
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if isinstance(datasets, dict):
            losses = [metrics[f"eval_{name}_loss"] for name in datasets]
            metrics["eval_loss"] = sum(losses) / len(losses)
            self.log({"eval_loss": metrics["eval_loss"]})
            self._paused += time.monotonic() - started
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Adds the routing to an evaluation's metrics; its loss is the mean over tokens."""
        self.eval_meter.reset()
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(*args, **kwargs)
        metrics = cast(dict[str, float], output.metrics)
        reading = self._shared(self.eval_meter)
        if reading is not None:
            name = metric_key_prefix.removeprefix("eval_")
            self.readings[name] = reading
            shares = {f"{metric_key_prefix}_share_{expert}": share for expert, share in reading.shares.items()}
            metrics.update(shares)
            metrics[f"{metric_key_prefix}_loss"] = reading.loss
            metrics[f"{metric_key_prefix}_token_entropy"] = reading.token_entropy
            metrics[f"{metric_key_prefix}_average_entropy"] = reading.average_entropy
        return output

    # Checkpoints.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Our checkpoint folder, and nothing pickled beside it."""
        if self.args.should_save:
            self._own_model().save_pretrained(str(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write everything aside, by all ranks, and rename it into place.

        Raises:
            CheckpointError: where it cannot be written; what was there before stays as it was.
            ValueError: for weights with NaN or infinity.
        """
        started = time.monotonic()
        self._own_model().router.collect_counts()
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        target = folder / checkpoint_name(step)
        aside = unfinished(target)
        check_finite(self._own_model(), target)
        self.store_flos()
        try:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            best = self.state.best_global_step
            if best and (best == step or (folder / checkpoint_name(best)).is_dir()):
                self.state.best_model_checkpoint = str(folder / checkpoint_name(best))
            self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._seal(aside)
                replace_folder(aside, target)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:  # RuntimeError: torch.save on a full disk
            if is_lost_peer(error):
                raise
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(self._cannot_save(target, error)) from error
        if self.args.should_save:
            self._rotate(folder)
        self.accelerator.wait_for_everyone()
        self._paused += time.monotonic() - started

    def _seal(self, aside: Path) -> None:
        model = self._own_model()
        self.state.save_to_json(str(aside / "trainer_state.json"))
        save_file(self._gate_start or self._gate_rows(), aside / GATE_START_FILE)
        record = {
            **self.training,
            "step": self.state.global_step,
            "epoch": self.state.epoch,
            "world_size": self.args.world_size,
            "trainable": trainable_set(model),
        }
        losses = {name: reading.loss for name, reading in self.readings.items()}
        known = {"before": self.training.get("losses_before", {}), "after": losses}
        write_files(model, aside, training=record, losses=known if losses else None)

    def _cannot_save(self, target: Path, error: Exception) -> str:
        whole = [path.name for _, path in checkpoints_in(target.parent)]
        left = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        if isinstance(error, RuntimeError) and "inline_container" in reason:  # torch.save says no more than that
            reason = "a file could not be written to its end"
        try:
            free = f"; {shutil.disk_usage(target.parent).free / 1e6:,.0f} MB are free there"
        except OSError:
            free = ""
        return f"cannot save {target}: {reason}{free}. Nothing of it was kept; {left}"

    def _rotate(self, folder: Path) -> None:
        """Delete the oldest beyond `save_total_limit`, never the newest or the best."""
        limit = self.args.save_total_limit
        if limit is None or limit < 1:
            return
        found = [path for _, path in checkpoints_in(folder)]
        best = Path(self.state.best_model_checkpoint).name if self.state.best_model_checkpoint else None
        spare = [path for path in found[:-1] if path.name != best]
        for path in spare[: max(len(found) - limit, 0)]:
            discard(path)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which at a limit of 1 would delete the newest checkpoint where an older one is the best."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._resumed = load_into(self._own_model(), folder).get("training", {})
        if (folder / GATE_START_FILE).is_file():
            self._gate_start = load_file(folder / GATE_START_FILE)

    def _load_best_model(self) -> None:
        load_into(self._own_model(), str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Refuses a state that is of other parameters, which PyTorch would tell by their number only."""
        if checkpoint is not None:
            saved, here = self._resumed.get("trainable"), trainable_set(self._own_model())
            if saved != here:
                raise CheckpointError(
                    f"the optimizer of {checkpoint} cannot go on: it trained {saved and saved['text']}, "
                    f"here {here['text']} would be trained"
                    + (", under other names or in another order" if saved and saved["text"] == here["text"] else "")
                )
        super()._load_optimizer_and_scheduler(checkpoint)

    def save_now(self) -> None:
        """Save where training stands, unless that is done."""
        folder = Path(self._get_output_dir(None)) / checkpoint_name(self.state.global_step)
        if not folder.is_dir():
            self._save_checkpoint(cast(nn.Module, self.model), None)

    def take_up(self, folder: Path, state: TrainerState) -> None:
        """Weights and state of a checkpoint whose training is over."""
        self._load_from_checkpoint(str(folder))
        self.state = state

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])


class Whole(nn.Module):
    """A model that nothing else may wrap: to the Trainer, what is another object than its model is wrapped already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.module(*args, **kwargs)


def without_fused_loss(config: dict[str, bool] | None) -> dict[str, bool]:
    """Liger's kernels but for its loss, which is one number, from which no dataset's own loss can be told.

    Raises:
        ValueError: where that loss is asked for.
    """
    config = dict(config or {})
    if config.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config asks for fused_linear_cross_entropy, which leaves no loss of each token; set the "
            "model's loss_chunk_size instead (--loss_chunk_size)"
        )
    return {**config, "fused_linear_cross_entropy": False}


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Its order follows from a seed and the epoch, not from what was drawn at random before."""

    def __init__(self, batch_size: int, *, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
