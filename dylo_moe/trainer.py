"""The HF Trainer, told what to save, how to count a step's tokens, and what to log about routing."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from .meter import Meter, Reading
from .model import DyLoRAMoE


class DyLoRATrainer(Trainer):
    """`transformers.Trainer` for a `DyLoRAMoE` model; with label smoothing, which the stock one does past the model.

    Batches may hold `domain`, int64 [batch] or in packed rows [batch, seq], the position of each row's or token's
    dataset in `domains`; losses and routing are then logged per domain. Evaluation reports the language-model
    loss alone, as a mean over tokens.

    Args:
        domains: names of the datasets.
        others: as for `transformers.Trainer`.
    """

    def __init__(self, *args: Any, domains: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_smoother = None  # it would take the labels out of the model's sight; the model smooths itself
        experts = cast(DyLoRAMoE, self.model).experts.names
        self.domains = domains
        self.train_meter = Meter(domains, experts)
        self.eval_meter = Meter(domains, experts)
        self.readings: dict[str, Reading] = {}
        """The last evaluation's, by dataset."""
        self._balance_sum, self._balance_steps = 0.0, 0
        self._step_tokens: Tensor | None = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Also counts the real tokens of the whole optimizer step, over all ranks."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [batch["attention_mask"].sum() for batch in samples if "attention_mask" in batch]
        self._step_tokens = torch.stack(counts).sum().to(device) if len(counts) == len(samples) and counts else None
        if self._step_tokens is not None and self.args.average_tokens_across_devices and self.args.world_size > 1:
            self._step_tokens = self.accelerator.gather(self._step_tokens).sum()
        return samples, num_items

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
        meter.add(logits=outputs.logits, labels=inputs["labels"], routing=outputs.routing, domain=domain)
        if model.training:
            self._balance_sum += float(outputs.balance_loss.detach())
        else:
            loss = outputs.lm_loss
        return (loss, outputs) if return_outputs else loss

    def _shared(self, meter: Meter) -> Reading | None:
        """The meter's reading over all ranks, after which it starts over."""
        if meter.sums is not None and self.args.world_size > 1:
            meter.sums = self.accelerator.reduce(meter.sums, "sum")
        reading = meter.read()
        meter.reset()
        return reading

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to a training log what the tokens since the last one did."""
        reading = self._shared(self.train_meter) if "loss" in logs else None
        if reading is not None:
            steps = max(self.state.global_step - self._balance_steps, 1)
            logs = {**logs, "lm_loss": reading.loss, "balance_loss": self._balance_sum / steps, **as_metrics(reading)}
            self._balance_sum, self._balance_steps = 0.0, self.state.global_step
        super().log(logs, *args, **kwargs)

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

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Our checkpoint folder, and nothing pickled beside it."""
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir or self.args.output_dir)


def as_metrics(reading: Reading) -> dict[str, float]:
    """A training log's routing metrics under their stable names."""
    metrics = {"token_entropy": reading.token_entropy, "average_entropy": reading.average_entropy}
    metrics |= {f"loss_{domain}": loss for domain, loss in reading.domain_losses.items()}
    metrics |= {f"share_{expert}": share for expert, share in reading.shares.items()}
    for domain, shares in reading.domain_shares.items():
        metrics |= {f"share_{domain}_{expert}": share for expert, share in shares.items()}
    return metrics
