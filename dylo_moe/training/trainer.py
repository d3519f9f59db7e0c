"""The Trainer of a DyLoRA-MoE model: how a step's tokens are counted, what is measured, and what is logged.

Its checkpoints are in trainer_checkpoints.py. Three private methods of `transformers.Trainer` are overridden here; each
says why no public one serves, and tests/training/test_trainer_private.py fails when Transformers changes what it relies
on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_pt_utils import LengthGroupedSampler

from dylo_moe.training.alarms import AlarmBell, alarms
from dylo_moe.training.metrics import Meter, MeterReading, as_metrics, gate_drift, gradient_norms, token_losses
from dylo_moe.training.sharding import ShardedModel, average_gradients, is_sharded
from dylo_moe.training.trainer_checkpoints import CheckpointingTrainer
from dylo_moe.utils.harmless import harmless_logger

OnAlarm = Callable[[int, list[str]], None]
"""Called with the step and one sentence for each alarm about the routing that begins or ends there."""

LOGGER = harmless_logger(__name__)


def log_alarms(step: int, sentences: list[str]) -> None:
    """Log alarms about the routing as warnings."""
    for sentence in sentences:
        LOGGER.warning("step %d: %s", step, sentence)


class DyLoRATrainer(CheckpointingTrainer):
    """`transformers.Trainer` for a `DyLoRAMoE` model, with label smoothing inside the model.

    Batches may hold `domain`, int64 [batch], or in packed rows [batch, seq]: the position of each row's or token's
    dataset in `domains`. Losses and routing are then logged for each dataset. An evaluation reports the language-model
    loss alone, as a mean over tokens; of several datasets, `eval_loss` is the mean of their losses, each counted alike.

    An evaluation leaves the random state as it was, so that a run resumed after it draws the same numbers.

    With `use_liger_kernel` Liger's kernels are used except for its loss, which the model's `loss_chunk_size` replaces.

    In several processes each optimizer step equals that of one process with as many rows: losses, gradients,
    utilisation and balance are computed over all ranks, and a row that only fills up the last batch of a pass counts
    for nothing. The ranks train under DistributedDataParallel or, where `shard_base` has sharded the base, as that
    function describes.

    Args:
        domains: names of the datasets.
        on_alarm: called when an alarm about the routing begins or ends; None: it is logged as a warning.
        others: as for `CheckpointingTrainer`.
    """

    def __init__(self, *args: Any, domains: list[str], on_alarm: OnAlarm | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.use_liger_kernel:
            self.args.liger_kernel_config = without_fused_loss(self.args.liger_kernel_config)
        self.label_smoother = None  # it would hide the labels from the model, which smooths by itself
        experts = self.own_model().router.names
        self.domains = domains
        self.train_meter = Meter(domains, experts)
        self.eval_meter = Meter(domains, experts)
        self.step_tokens: Tensor | None = None
        """Real tokens of the present optimizer step, over all ranks; None where the batches have no mask."""
        self._routed_tokens: Tensor | None = None
        """Those of them that are routed: with response granularity, the answers'."""
        self._balance_sum, self._balance_steps = 0.0, 0
        self._num_parameters: int | None = None
        self._on_alarm, self._bell = on_alarm or log_alarms, AlarmBell()
        self._gradient_norms: dict[str, Tensor] = {}
        self._logged_at = time.monotonic()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    # The batches of a step.

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """The order of the training rows, which follows from the seed and the epoch alone.

        Why this private method is overridden: the Trainer's own sampler of rows grouped by length draws from the global
        random state, so that a resumed epoch would have another order, and groups the rows of one process instead of
        those of a step. The public `get_train_dataloader` returns batches that are shared out among the ranks already.
        """
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            rows_per_step = sampler.batch_size * self.args.world_size
            return EpochLengthGroupedSampler(rows_per_step, lengths=sampler.lengths, seed=seed)
        return sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of one optimizer step, whose real tokens are counted over all ranks."""
        num_rows, batch_size = len(cast(Any, self.train_dataset)), self.args.train_batch_size
        batches = (self._without_repeats(batch, num_rows, batch_size) for batch in epoch_iterator)
        samples, num_items = super().get_batch_samples(batches, num_batches, device)
        self.step_tokens = self._routed_tokens = None
        if samples and all("attention_mask" in batch for batch in samples):
            masks = [batch["attention_mask"] for batch in samples]
            routed = [self.own_model().routed_tokens(batch) for batch in samples]
            counts = torch.stack([torch.stack([part.sum() for part in parts]).sum() for parts in (masks, routed)])
            counts = counts.to(device)
            if self.args.world_size > 1:
                counts = self.accelerator.gather(counts[None]).sum(0)
            self.step_tokens, self._routed_tokens = counts
        return samples, num_items

    def _without_repeats(self, batch: dict[str, Any], num_rows: int, batch_size: int) -> dict[str, Any]:
        """A batch in which repeated rows are emptied.

        At the end of a pass Accelerate repeats rows of its beginning, so that all ranks have equally many; in the order
        of the ranks, the real rows come first. Accelerate's own count of them, `remainder`, is wrong where a run
        resumes in the middle of a pass.

        Args:
            num_rows: rows of the whole pass.
            batch_size: rows that one rank takes at once.
        """
        if self.args.world_size == 1 or not self.accelerator.gradient_state.end_of_dataloader:
            return batch
        left = num_rows % (batch_size * self.args.world_size)
        if left == 0:
            return batch
        real = max(left - batch_size * self.args.process_index, 0)
        labels, mask = batch["labels"].clone(), batch["attention_mask"].clone()
        labels[real:], mask[real:] = -100, 0
        return {**batch, "labels": labels, "attention_mask": mask}

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """One batch of an evaluation, in which each row counts once."""
        rows = cast(Any, self.callback_handler.eval_dataloader).dataset
        inputs = self._without_repeats(inputs, len(rows), self.args.eval_batch_size)
        return super().prediction_step(model, inputs, *args, **kwargs)

    # The loss and the gradients of a step.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss; losses and routing of its tokens are added to the meter."""
        inputs = dict(inputs)
        domain = inputs.pop("domain", None)
        if model.training:
            inputs["label_smoothing"] = self.args.label_smoothing_factor
            if self._routed_tokens is not None:
                inputs["num_tokens_in_batch"] = self._routed_tokens
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if domain is None:
            domain = torch.zeros(len(inputs["labels"]), dtype=torch.int64)
        meter = self.train_meter if model.training else self.eval_meter
        losses = token_losses(outputs, inputs["labels"])
        given = {"routing": outputs.routing, "mask": inputs.get("attention_mask")}
        meter.add(losses=losses, labels=inputs["labels"], domain=domain, **given)
        if model.training:
            self._balance_sum += float(outputs.balance_loss.detach())
        else:
            loss = outputs.lm_loss
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch; the gradients of a whole step are measured before clipping."""
        if self.gate_start is None:
            self.gate_start = self.gate_rows()
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            if is_sharded(self.own_model()):
                average_gradients(self.own_model())
            self._balance_steps += 1
            scaler = getattr(self.accelerator, "scaler", None)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            self._gradient_norms = gradient_norms(self.own_model(), scale=scale)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate, with the parameters counted once: a count at every step would take longer with
        every expert of the pool."""
        if self._num_parameters is None:
            self._num_parameters = int(self.own_model().base.num_parameters(exclude_embeddings=True))
        return 6 * inputs["input_ids"].numel() * self._num_parameters

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients of the experts and the router that are trained.

        Why this private method is overridden: the Trainer's own walks through all parameters at every step, which takes
        the longer the more experts are frozen, about 0.1 s for 50 experts of 210 linears each. No public method is
        called between the backward and the clipping. Without clipping (`--max_grad_norm 0`) the Trainer's own walk
        remains."""
        own = self.own_model()
        learning = [*own.experts.learning(), *own.router.parameters()]
        return super()._clip_grad_norm(SimpleNamespace(parameters=lambda: learning))

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Wrap the model for training in several processes.

        Why this private method is overridden: Accelerate, which wraps the model after the Trainer's own method, leaves
        one alone that an evaluation has prepared before, so that the ranks would train apart. The public
        `model_wrapped` would have to be set between the loading of a checkpoint and this call.
        """
        wrapped = super()._wrap_model(model, training, dataloader)
        if not training or self.args.world_size == 1 or isinstance(wrapped, (DistributedDataParallel, ShardedModel)):
            return wrapped
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        if is_sharded(model):
            return ShardedModel(model)
        device = self.args.device
        device_ids = None if device.type == "cpu" else [device]
        return DistributedDataParallel(model, device_ids=device_ids, **self.accelerator.ddp_handler.to_kwargs())

    # What is measured and logged.

    def _read_over_ranks(self, meter: Meter) -> MeterReading | None:
        """The meter's reading over all ranks, after which the meter starts again."""
        if meter.sums is not None and self.args.world_size > 1:
            meter.sums = self.accelerator.reduce(meter.sums, "sum")
        reading = meter.read()
        meter.reset()
        return reading

    def _sum_over_ranks(self, number: float) -> float:
        if self.args.world_size == 1:
            return number
        return float(self.accelerator.reduce(torch.tensor(number, device=self.args.device), "sum"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to a training log what was measured since the last one."""
        reading = self._read_over_ranks(self.train_meter) if "loss" in logs else None
        if reading is not None:
            seconds = max(time.monotonic() - self._logged_at - self.paused_seconds, 1e-9)
            drift = {} if self.gate_start is None else gate_drift(self.gate_start, self.gate_rows())
            logs = {
                **logs,
                "lm_loss": reading.loss,
                "balance_loss": self._sum_over_ranks(self._balance_sum) / max(self._balance_steps, 1),
                **as_metrics(reading),
                "tokens_per_second": reading.num_tokens / seconds,
                **{f"grad_norm_{name}": float(norm) for name, norm in self._gradient_norms.items()},
                **{f"gate_drift_{name}": value for name, value in drift.items()},
            }
            self._balance_sum, self._balance_steps = 0.0, 0
            self._logged_at, self.paused_seconds = time.monotonic(), 0.0
        super().log(logs, *args, **kwargs)
        changes = [] if reading is None else self._bell.changes(alarms(reading), reading.num_routed)
        if changes:
            self._on_alarm(self.state.global_step, changes)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the Trainer does; of several datasets, `eval_loss` is the mean of their losses."""
        started = time.monotonic()
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if isinstance(datasets, dict):
            losses = [metrics[f"eval_{name}_loss"] for name in datasets]
            metrics["eval_loss"] = sum(losses) / len(losses)
            self.log({"eval_loss": metrics["eval_loss"]})
            self.pause(time.monotonic() - started)
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate one dataset; the metrics get the routing, and the loss as a mean over tokens."""
        self.eval_meter.reset()
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(*args, **kwargs)
        metrics = cast(dict[str, float], output.metrics)
        reading = self._read_over_ranks(self.eval_meter)
        if reading is not None:
            self.readings[metric_key_prefix.removeprefix("eval_")] = reading
            shares = {f"{metric_key_prefix}_share_{expert}": share for expert, share in reading.shares.items()}
            metrics.update(shares)
            metrics[f"{metric_key_prefix}_loss"] = reading.loss
            metrics[f"{metric_key_prefix}_token_entropy"] = reading.token_entropy
            metrics[f"{metric_key_prefix}_average_entropy"] = reading.average_entropy
        return output


def without_fused_loss(config: dict[str, bool] | None) -> dict[str, bool]:
    """Liger's kernels without its loss, a single number that no dataset's own loss can be read from.

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
    """Rows grouped by length, in an order that follows from a seed and the epoch, not from earlier random draws."""

    def __init__(self, batch_size: int, *, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
