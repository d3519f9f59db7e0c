"""The Trainer of one stage of a stream: it trains one expert, with a learning rate of two phases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dylo_moe.commands.stream.arguments import OWN, StreamArguments
from dylo_moe.model.saving import save_tensors
from dylo_moe.training.scheduler import TwoPhaseLR
from dylo_moe.training.trainer import DyLoRATrainer

SEEDING_TEMPERATURES = (100.0, 1.0)
"""The temperatures of dense seeding at its first and its last step; it falls geometrically between them. It begins high
because the logits of fitted gate rows are many nats apart on their own tokens, and the weights should begin nearly
uniform."""


BEST_FILE = "best_expert.safetensors"
"""The file of a checkpoint with the expert's weights at the best evaluation so far."""


class Evaluation(NamedTuple):
    """An evaluation of the rows that a stage keeps back."""

    step: int
    loss: float


class StageTrainer(DyLoRATrainer):
    """Trains one expert; all others, and every gate row, must be frozen already.

    With seeding "own" every token of the data is routed to the expert. With "dense" the expert is seeded beside the
    others: the routing weights are softmax(logits / temperature) over the whole pool, with a temperature that falls
    from nearly uniform weights to one expert a token. In consolidation every token is routed to the expert.

    Args:
        expert: the name of the expert to train.
        stream: the two rates, the share of the steps at the high one, and how a new expert is seeded.
        is_new: False for an expert that already knows the skill: all steps are consolidation.
        args, kwargs: the arguments of `DyLoRATrainer`; `args.learning_rate` is the high rate.
    """

    def __init__(self, *args: Any, expert: str, stream: StreamArguments, is_new: bool, **kwargs: Any) -> None:
        # The stage says which expert gets the tokens, so that there is nothing to warn of.
        super().__init__(*args, on_alarm=lambda step, sentences: None, **kwargs)
        self.expert, self.stream, self.is_new = expert, stream, is_new
        self._best_weights: list[Tensor] = []
        self.num_tokens = 0
        """The number of real tokens trained on so far."""

    @property
    def switch_step(self) -> int:
        """The first step of consolidation; it is known once training has begun."""
        return 0 if self.lr_scheduler is None else cast(TwoPhaseLR, self.lr_scheduler).switch_step

    def planned_switch(self, num_training_steps: int) -> int:
        """The first step of consolidation, unless it begins early."""
        return round(self.stream.seeding_share * num_training_steps) if self.is_new else 0

    def begin_consolidation(self) -> None:
        """Train at the low rate, and every token with the expert, from the next step on."""
        cast(TwoPhaseLR, self.lr_scheduler).switch_now()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of two phases, which replaces that of `lr_scheduler_type`."""
        if self.lr_scheduler is None:
            self.lr_scheduler = TwoPhaseLR(
                cast(Any, self.optimizer if optimizer is None else optimizer),
                low_ratio=self.stream.consolidation_learning_rate / self.stream.seeding_learning_rate,
                switch_step=self.planned_switch(num_training_steps),
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
            )
        return self.lr_scheduler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Take the batches of one optimizer step, and add their tokens to the count of the stage."""
        samples = super().get_batch_samples(*args, **kwargs)
        if self.step_tokens is not None:
            self.num_tokens += int(self.step_tokens)
        return samples

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of one micro-batch, routed as the phase of the training says."""
        with self._routing():
            return super().training_step(model, *args, **kwargs)

    def _routing(self) -> AbstractContextManager[None]:
        step = self.state.global_step
        if self.stream.seeding == OWN or step >= self.switch_step:
            return self.own_model().route_to(self.expert)
        return self._dense(step / self.switch_step)

    @contextmanager
    def _dense(self, done: float) -> Iterator[None]:
        router = self.own_model().router
        before, (first, last) = router.temperature, SEEDING_TEMPERATURES
        router.temperature = first * (last / first) ** done
        try:
            yield
        finally:
            router.temperature = before

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss, the first of equals; None where there is no finite one."""
        found = [
            Evaluation(int(line["step"]), line["eval_loss"]) for line in self.state.log_history if "eval_loss" in line
        ]
        return min((item for item in found if math.isfinite(item.loss)), key=lambda item: item.loss, default=None)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the rows that were kept back with the expert alone, and keep its weights if they are the best."""
        with self.own_model().route_to(self.expert):
            metrics = super().evaluate(*args, **kwargs)
        self.readings.clear()  # they would stand in the checkpoint as held-out losses
        if self.best is not None and self.best.step == self.state.global_step:
            self._best_weights = [weight.detach().clone() for weight in self._weights()]
        return metrics

    def _weights(self) -> list[Tensor]:
        return list(self.own_model().experts.parameters(self.expert))

    @torch.no_grad()
    def end_with_best(self) -> None:
        """Give the expert the weights of the best evaluation; without one they stay as they are."""
        for weight, best in zip(self._weights(), self._best_weights or self._weights(), strict=True):
            weight.copy_(best)

    def _complete(self, aside: Path) -> None:
        """Add the best weights so far to a checkpoint."""
        if self._best_weights:
            save_tensors({str(place): weight for place, weight in enumerate(self._best_weights)}, aside / BEST_FILE)
        super()._complete(aside)

    def checkpoint_record(self) -> dict[str, Any]:
        """The record of the training, with the number of tokens that the stage has trained on."""
        return {**super().checkpoint_record(), "num_tokens": self.num_tokens}

    def load_weights(self, folder: Path) -> dict[str, Any]:
        """Load the weights of a checkpoint and the count of the stage's tokens; returns its record of the training."""
        record = super().load_weights(folder)
        self.num_tokens = record["num_tokens"]
        if (folder / BEST_FILE).is_file():
            saved = load_file(folder / BEST_FILE)
            self._best_weights = [saved[str(place)].to(weight) for place, weight in enumerate(self._weights())]
        return record
