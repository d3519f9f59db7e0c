"""What a training is asked for: the model's options, and what we change of the Trainer's and add to them.

Nothing here imports PyTorch or Transformers, so that `--help` answers at once; `trainer_arguments.py` has the whole of
the Trainer's arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dylo_moe.base.packages import GEMMA
from dylo_moe.routing.config import BALANCE_COEFFICIENT
from dylo_moe.training.run_folder import NEW_RUN
from dylo_moe.utils.checks import NOT_NEGATIVE, range_problems

DEFAULT_BASE = "google/codegemma-2b"


@dataclass
class ModelArguments:
    """Flags of the model beside those of its experts (`ExpertConfig`) and of its router (`RouterConfig`)."""

    model: str = field(
        default=DEFAULT_BASE,
        metadata={
            "help": "Base model: a hub id, a folder, or smollm2-135m or gemma3-270m (small, need no hub and no token)."
        },
    )
    accept_gemma_terms: bool = field(
        default=False,
        metadata={
            "help": "You accept the Gemma Terms of Use, https://ai.google.dev/gemma/terms; without it "
            "--model gemma3-270m is not fetched."
        },
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
        problems = range_problems(vars(self), {"loss_chunk_size": NOT_NEGATIVE, "balance_coefficient": NOT_NEGATIVE})
        if self.accept_gemma_terms and self.model != GEMMA:
            problems.append(f"accept_gemma_terms is for --model {GEMMA}, and model is {self.model!r}; leave it out")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass
class TrainerOptions:
    """Arguments of the Trainer whose defaults or help differ here, and those that are added to it.

    `TrainArguments` has them, beside all others of the Trainer.
    """

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
            "nargs": "?",
            "const": "latest",
            "help": "Resume a run: its folder, one of its checkpoints, or latest (also without a value), the run in "
            "--output_dir, else the newest in runs; auto: the same, and a new run where --output_dir has none. "
            "Settings are the checkpoint's; those that are given are compared with them.",
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
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Not offered."})
