"""The Trainer's arguments with our defaults, checked against the machine that trains."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from dylo_moe.base.loading import NEEDS_BITSANDBYTES
from dylo_moe.training.arguments import ModelArguments, TrainerOptions
from dylo_moe.utils.checks import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_ONE, Range, range_problems
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.words import nearest

OF_JSON = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "accelerator_config", "fsdp_config")
"""The Trainer's flags that hold a mapping, which is typed as JSON; the last two may be the path of a file with it."""

RANGES = {
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "learning_rate": POSITIVE,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "adam_beta1": SHARE_BELOW_ONE,
    "adam_beta2": SHARE_BELOW_ONE,
    "adam_epsilon": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE_BELOW_ONE,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_steps": POSITIVE,
    "save_total_limit": COUNT,
    "early_stopping_patience": COUNT,
    "early_stopping_threshold": NOT_NEGATIVE,
    "eval_benchmark_steps": COUNT,
    "dataloader_num_workers": Range(0, is_whole=True),
    "seed": SEED,
    "data_seed": SEED,
}
"""The numbers that the Trainer's flags may have."""

CHOICES: dict[str, type[Enum]] = {
    "eval_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "logging_strategy": IntervalStrategy,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
}
"""The words that the Trainer's flags may have."""


@dataclass
class TrainArguments(TrainerOptions, TrainingArguments):  # type: ignore[misc]
    """The Trainer's arguments, with our defaults where they differ from its own."""

    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches in memory; default where a GPU is."}
    )

    trains_here = True  # not a field; False for a run that is only planned, whose machine may have another device

    shards_base = False  # not a field, and so no flag: `take_sharding` sets it

    def __post_init__(self) -> None:
        problems = self.problems_of(vars(self))
        if problems:
            raise ValueError("; ".join(problems))
        if text_of(self.eval_strategy) != "no" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # so that the best checkpoint is known and kept
        if str(self.fsdp).lower() in ("true", "false"):  # as a recipe says it
            self.fsdp = True if str(self.fsdp).lower() == "true" else None  # type: ignore[assignment]
        wanted = self.use_cpu
        # Else bf16 is refused where there is no GPU.
        self.use_cpu = wanted or not self.trains_here or not torch.accelerator.is_available()
        super().__post_init__()
        self.use_cpu = wanted  # a setting of the run, which may be resumed where there is a GPU
        self._check_rows_are_shared_evenly()
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("use_liger_kernel needs Liger's kernels: pip install liger-kernel")
        if self.use_liger_kernel and self.trains_here and self.device.type == "cpu":
            raise ValueError("use_liger_kernel needs a GPU, for which its kernels are written; leave it out")

    @classmethod
    def problems_of(cls, values: Mapping[str, Any]) -> list[str]:
        """The problems that can be seen without setting up a device.

        Args:
            values: the value of each flag, as it was typed or as it is in an instance.
        """
        problems = range_problems(values, RANGES)
        has_gpu = not cls.trains_here or torch.accelerator.is_available()
        for name, kind in CHOICES.items():
            known = [str(member.value) for member in kind]
            if text_of(values.get(name, known[0])) not in known:
                near = nearest(text_of(values[name]), known)
                hint = f"did you mean {near}?" if near else f"it must be one of {', '.join(known)}"
                problems.append(f"{name} is {text_of(values[name])!r}; {hint}")
        problems += [problem for name in OF_JSON if (problem := _json_problem(name, values.get(name)))]
        steps = values.get("max_steps", -1)
        if steps != -1 and not COUNT.holds(steps):
            problems.append(f"max_steps is {steps!r}; it must be {COUNT}, or -1 to train num_train_epochs")
        if values.get("early_stopping_patience") is not None and text_of(values.get("eval_strategy", "")) == "no":
            problems.append("early_stopping_patience is given, but eval_strategy is no, so nothing is evaluated")
        names = values.get("report_to") or []
        known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
        for name in [names] if isinstance(names, str) else names:
            if name not in (*known, "none", "all"):
                problems.append(f"report_to is {name!r}; it must be none or one of {', '.join(known)}")
        when, saved = (text_of(values.get(name, "")) for name in ("eval_strategy", "save_strategy"))
        if values.get("load_best_model_at_end") and saved != "best" and when != saved:
            problems.append(
                f"load_best_model_at_end needs an evaluation at each checkpoint, but eval_strategy is {when} and "
                f"save_strategy {saved}; give both the same value"
            )
        if saved == "best" and when == "no":
            problems.append("save_strategy is best, but eval_strategy is no, so nothing is evaluated")
        if values.get("bf16") and values.get("fp16"):
            problems.append("bf16 and fp16 are both given; leave one of them out")
        elif values.get("fp16") and (values.get("use_cpu") or not has_gpu):
            why = "use_cpu is given" if values.get("use_cpu") else "this machine has none"
            problems.append(f"fp16 needs a GPU, and {why}; give bf16, or leave both out for the base's own precision")
        if values.get("fsdp_config") and text_of(values.get("fsdp")).lower() in ("none", "false", ""):
            problems.append("fsdp_config is given, but nothing is shared without --fsdp true; add that or leave it out")
        return problems

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


class ArgumentsElsewhere(TrainArguments):
    """The Trainer's arguments of a run that this machine only plans or sends, and need not be able to train."""

    trains_here = False


def check_four_bit(model: ModelArguments, train: TrainArguments) -> None:
    """Raises UsageError where load_in_4bit cannot apply."""
    if not model.load_in_4bit:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"load_in_4bit cannot apply here: {NEEDS_BITSANDBYTES}")
    if train.fp16:
        raise UsageError("load_in_4bit was not tested with fp16; leave fp16 out, or use bf16")


def text_of(value: Any) -> str:
    """The word of a choice, which is a member of an enumeration once the Trainer's arguments are made."""
    return str(getattr(value, "value", value))


def _json_problem(name: str, value: Any) -> str | None:
    if not isinstance(value, str) or (name.endswith("_config") and not value.startswith("{")):
        return None
    try:
        is_mapping = isinstance(json.loads(value), dict)
    except ValueError:
        is_mapping = False
    return None if is_mapping else f"""{name} is {value!r}; it must be JSON such as '{{"name": 1}}'"""
