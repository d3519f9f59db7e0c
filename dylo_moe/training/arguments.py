"""What a training is asked for: the model's options, and the Trainer's arguments with our defaults."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from dylo_moe.base.loading import DEFAULT_BASE, NEEDS_BITSANDBYTES
from dylo_moe.routing.config import BALANCE_COEFFICIENT
from dylo_moe.training.run_folder import NEW_RUN
from dylo_moe.utils.errors import UsageError


@dataclass
class ModelArguments:
    """Flags of the model beside those of its experts (`ExpertConfig`) and of its router (`RouterConfig`)."""

    model: str = field(
        default=DEFAULT_BASE,
        metadata={"help": "Base model: a hub id, a folder, or smollm2-135m (small, needs no hub and no token)."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the base: eager, sdpa, flash_attention_2, ...; default: Transformers' choice."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Hold the base's linears in 4 bits (QLoRA's NormalFloat with double quantisation); products are "
            "computed in the base's dtype, with --bf16 in bf16. Needs bitsandbytes."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose logits exist at once where the loss is computed; 0: all. Default: all of a small "
            "vocabulary, of a large one (100,000 entries) as many as take 256 MiB."
        },
    )
    balance_coefficient: float = field(
        default=BALANCE_COEFFICIENT, metadata={"help": "Weight of the loss that keeps the experts evenly used."}
    )

    def __post_init__(self) -> None:
        if self.loss_chunk_size is not None and self.loss_chunk_size < 0:
            raise ValueError(f"loss_chunk_size is {self.loss_chunk_size}; it must be at least 0")


@dataclass
class TrainArguments(TrainingArguments):
    """The Trainer's arguments, with our defaults where they differ from its own."""

    output_dir: str = field(
        default=NEW_RUN, metadata={"help": "Where the run is written; must be new or empty. new: runs/ and the time."}
    )
    num_train_epochs: float = field(
        default=10.0, metadata={"help": "Passes over the training rows.", "aliases": ["--num_epochs"]}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of experts and gate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate while training: no, steps, epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save while training: no, steps, epoch."})
    load_best_model_at_end: bool = field(
        default=False,
        metadata={"help": "End with the checkpoint of the lowest eval_loss (--metric_for_best_model), not the last."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations in a row whose eval_loss did not fall."}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much eval_loss must fall to count, in nats per token."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on with a run: its folder, one of its checkpoints, or latest, the newest in --output_dir; "
            "auto: the same, and a new run where --output_dir has none. Settings are the checkpoint's; those that are "
            "given are compared with them."
        },
    )
    wandb_checkpoint_artifact: str | None = field(
        default=None,
        metadata={"help": "The same, from a checkpoint kept by Weights & Biases: ENTITY/PROJECT/NAME:ALIAS."},
    )
    eval_benchmark: str | None = field(
        default=None,
        metadata={"help": "Also judge programs while training: humaneval:20 (its first 20 problems), mbpp, or both."},
    )
    eval_benchmark_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps between these; needed with eval_benchmark."}
    )
    allow_code_execution: bool | None = field(
        default=None, metadata={"help": "Run what the model writes, in isolation; eval_benchmark needs it."}
    )
    sandbox: str | None = field(
        default=None, metadata={"help": "How it is isolated, as in dylora eval; default: bubblewrap."}
    )
    include_num_input_tokens_seen: str = field(  # the Trainer's own takes no word from a command line
        default="no",
        metadata={"help": "Log the tokens seen: no, all, non_padding.", "choices": ["no", "all", "non_padding"]},
    )
    save_only_model: bool = field(default=False, metadata={"help": "Not offered."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not offered."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Not offered."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches in memory; default where a GPU is."}
    )
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Not offered."})

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
