"""The Trainer's arguments with our defaults, checked against the machine that trains."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from dylo_moe.base.loading import NEEDS_BITSANDBYTES
from dylo_moe.training.arguments import ModelArguments, TrainerOptions
from dylo_moe.utils.errors import UsageError


@dataclass
class TrainArguments(TrainerOptions, TrainingArguments):  # type: ignore[misc]
    """The Trainer's arguments, with our defaults where they differ from its own."""

    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches in memory; default where a GPU is."}
    )

    shards_base = False  # not a field, and so no flag: `take_sharding` sets it

    def __post_init__(self) -> None:
        has_evaluations = str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no"
        if has_evaluations and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # so that the best checkpoint is known and kept
        if str(self.fsdp).lower() in ("true", "false"):  # as a recipe says it
            self.fsdp = True if str(self.fsdp).lower() == "true" else None  # type: ignore[assignment]
        if self.fsdp_config and not self.fsdp:
            raise ValueError(
                "fsdp_config is given, but nothing is shared without --fsdp true; add that, or leave it out"
            )
        super().__post_init__()
        self._check_rows_are_shared_evenly()
        patience = self.early_stopping_patience
        if patience is not None and (patience < 1 or not has_evaluations):
            rule = "it must be at least 1" if patience < 1 else "but eval_strategy is no, so nothing is evaluated"
            raise ValueError(f"early_stopping_patience is {patience}; {rule}")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("use_liger_kernel needs Liger's kernels: pip install liger-kernel")
        if self.use_liger_kernel and self.device.type == "cpu":
            raise ValueError("use_liger_kernel needs a GPU, for which its kernels are written; leave it out")

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: at most one, because the Trainer would train on several with `nn.DataParallel`, which
        cannot gather our outputs. Several GPUs are used by as many processes (torchrun, accelerate launch)."""
        return min(super().n_gpu, 1)

    @property
    def place_model_on_device(self) -> bool | None:
        """Whether the Trainer moves the model to the device; None leaves that to the Trainer. A sharded base is on its
        devices already, and offloaded shares must stay in the memory of the host."""
        return False if self.shards_base else None

    def _check_rows_are_shared_evenly(self) -> None:
        fixed = {"split_batches": False, "dispatch_batches": None, "even_batches": True}
        others = [name for name, ours in fixed.items() if getattr(self.accelerator_config, name) not in (ours, None)]
        if others:
            raise ValueError(
                f"accelerator_config sets {', '.join(others)}, but how processes share rows is fixed: each takes "
                "per_device_train_batch_size at once"
            )


def check_four_bit(model: ModelArguments, train: TrainArguments) -> None:
    """Raises UsageError where load_in_4bit cannot apply."""
    if not model.load_in_4bit:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"load_in_4bit cannot apply here: {NEEDS_BITSANDBYTES}")
    if train.fp16:
        raise UsageError("load_in_4bit was not tested with fp16; leave fp16 out, or use bf16")
