"""The flags of `dylora stream`: those of `dylora train` that apply, and when and how the pool grows."""

from __future__ import annotations

from dataclasses import dataclass, field

from dylo_moe.continual.config import GrowthConfig
from dylo_moe.data.config import DataConfig
from dylo_moe.experts.config import ExpertConfig
from dylo_moe.parsing.command_line import CommandLine, refusal_of
from dylo_moe.routing.config import GrowingRouterConfig
from dylo_moe.training.arguments import ModelArguments, TrainerOptions

OWN = "own"

DENSE = "dense"

NOT_OFFERED = {
    "num_experts": "the pool grows with the data",
    **dict.fromkeys(
        ("shared_r", "shared_alpha"),
        "a shared expert is frozen while a pool grows, so that one which begins empty would never train it; a "
        "--checkpoint of dylora train may have one",
    ),
    "router_policy": "a pool that grows needs a gate that learns",
    **dict.fromkeys(
        ("eval_benchmark", "eval_benchmark_steps", "allow_code_execution", "sandbox"),
        "a stream evaluates by loss; run dylora eval on its checkpoints",
    ),
    "balance_coefficient": "gate rows are fitted, not trained, so no loss can balance them",
    "z_loss_coefficient": "gate rows are fitted, not trained",
    "entropy_coefficient": "gate rows are fitted, not trained",
    "interleaved_sampling": "skills come one after another",
    "mix": "skills come one after another",
    "learning_rate": "there are two rates: --seeding_learning_rate and --consolidation_learning_rate",
    "lr_scheduler_type": "the rate has two phases: see --seeding_learning_rate",
    "lr_scheduler_kwargs": "the rate has two phases: see --seeding_learning_rate",
    "eval_strategy": "every skill is evaluated after every stage",
    "eval_delay": "every skill is evaluated after every stage",
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        "a stage ends with its last step, or with --early_stopping_patience at the lowest loss of rows kept back",
    ),
    **dict.fromkeys(("fsdp", "fsdp_config"), "each process of a stream holds all of the base, to add experts to it"),
    "report_to": "the matrix is written to matrix.json and to the page; only dylora train logs to trackers",
    "run_name": "no tracker is written to",
    "project": "no tracker is written to",
    "wandb_checkpoint_artifact": "a stream is resumed from its folder: --resume_from_checkpoint",
}
"""Flags of `dylora train` that would have no effect or a wrong one here, each with the reason."""


@dataclass
class StreamArguments:
    """The flags that `dylora stream` has besides those of the model, the data and the Trainer."""

    checkpoint: str | None = field(
        default=None,
        metadata={"help": "Continue learning with this model: the checkpoint of a stream, or of dylora train."},
    )
    eval_datasets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Datasets that are measured after every stage and never trained on: general text, which should be "
            "routed to the unchanged base, or skills that --checkpoint knows."
        },
    )
    known_datasets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Datasets that a --checkpoint of dylora train was trained on: from one pass over them the skill "
            "library learns what its experts know. They are not trained on again."
        },
    )
    base_datasets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Datasets of general text that should stay with the unchanged base: gate rows are fitted against "
            "its statistics. Default: texts that the base itself writes. They are not trained on."
        },
    )
    chunk_examples: int | None = field(
        default=None,
        metadata={
            "help": "Take the datasets as one stream without labels, cut where another kind of text begins and into "
            "chunks of this many rows; which chunk brings a new skill is then found, not given."
        },
    )
    allow_expert_growth: bool = field(
        default=True, metadata={"help": "False: the pool is fixed. New data is reported, and nothing is trained on it."}
    )
    learn_with: str | None = field(
        default=None,
        metadata={"help": "The expert that is trained on all of the data, new or known; no expert grows then."},
    )
    ranks: list[int] = field(
        default_factory=list,
        metadata={"help": "Rank of each dataset's expert, in their order (8,16,32); default: lora_r for all."},
    )
    seeding: str = field(
        default=OWN,
        metadata={
            "help": "How a new expert is seeded: by its own data alone (own), or beside all others with weights that "
            "sharpen from uniform to one expert a token (dense).",
            "choices": [OWN, DENSE],
        },
    )
    seeding_learning_rate: float = field(
        default=1e-3, metadata={"help": "The high rate, for the beginning of a new expert's training."}
    )
    consolidation_learning_rate: float = field(
        default=1e-4, metadata={"help": "The low rate, for the rest of its training and for later training."}
    )
    seeding_share: float = field(
        default=0.7, metadata={"help": "Share of a new expert's steps at the high rate, from 0 to 1."}
    )
    skill_examples: int = field(
        default=512,
        metadata={
            "help": "The most training rows of a dataset or chunk that the novelty detector and the skill library read."
        },
    )

    keep_stages: bool = field(
        default=False, metadata={"help": "Keep the checkpoint of every stage, not of the last one only."}
    )

    def __post_init__(self) -> None:
        problems = []
        for name in ("eval_datasets", "known_datasets", "base_datasets"):
            split = [part.strip() for item in getattr(self, name) for part in item.split(",") if part.strip()]
            setattr(self, name, split)
        if self.chunk_examples is not None and self.chunk_examples < 2:
            problems.append(f"chunk_examples is {self.chunk_examples}; a chunk needs at least 2 rows")
        if any(rank < 1 for rank in self.ranks):
            problems.append(f"ranks has {min(self.ranks)}; a rank is at least 1")
        if self.chunk_examples is not None and self.ranks:
            problems.append("ranks cannot apply to a stream in chunks, whose skills are not known yet; use lora_r")
        low, high = self.consolidation_learning_rate, self.seeding_learning_rate
        if not 0 < low <= high:
            problems.append(
                f"consolidation_learning_rate is {low:g} and seeding_learning_rate {high:g}; the first must be above 0 "
                "and at most the second"
            )
        if not 0 <= self.seeding_share <= 1:
            problems.append(f"seeding_share is {self.seeding_share:g}; it must be from 0 to 1")
        if self.skill_examples < 2:
            problems.append(f"skill_examples is {self.skill_examples}; it must be at least 2")
        if self.known_datasets and self.checkpoint is None:
            problems.append("known_datasets says what a checkpoint knows; give --checkpoint too")
        if self.base_datasets and not self.allow_expert_growth:
            problems.append("base_datasets is for fitting gate rows, and with a fixed pool none is fitted")
        if not self.allow_expert_growth and self.checkpoint is None:
            problems.append("allow_expert_growth False leaves a new pool empty; give --checkpoint too")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass
class StageOptions(TrainerOptions):
    """The Trainer's arguments for a stage of a stream, where their defaults differ from those of `dylora train`."""

    num_train_epochs: float = field(
        default=3.0, metadata={"help": "Passes over the training rows of each dataset or chunk."}
    )
    eval_strategy: str = field(default="no", metadata={"help": "Not offered."})
    eval_steps: float | None = field(
        default=None,
        metadata={
            "help": "With early_stopping_patience: optimizer steps of a stage between two evaluations; default: "
            "logging_steps."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End a stage after so many evaluations in a row whose loss did not fall, and keep its best "
            "weights; a new expert then first goes on at the low rate. For that a tenth of the stage's training rows "
            "is kept back; the held-out rows that are reported decide nothing. Default: all steps are trained."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much that loss must fall to count, in nats per token."}
    )
    save_strategy: str = field(default="steps", metadata={"help": "When to save within a stage: no, steps, epoch."})
    save_steps: float = field(default=100, metadata={"help": "Number of optimizer steps of a stage between two saves."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Number of checkpoints kept within a stage."})


def stream_refusal(name: str) -> str | None:
    """Say why `dylora stream` does not offer a flag; None where it offers the flag."""
    return NOT_OFFERED.get(name) or refusal_of(name)


STREAM_CONFIGS = (ModelArguments, ExpertConfig, GrowingRouterConfig, StreamArguments, GrowthConfig, DataConfig)
"""The classes of our own flags; the Trainer's are in `StageArguments`."""

STREAM_LINE = CommandLine(
    prog="dylora stream",
    kinds=STREAM_CONFIGS,
    usage="dylora stream [--config RECIPE] [--FLAG VALUE ...]",
    description="Learn datasets one after another, and forget none: what is new grows an expert of its own. After "
    "every stage all of them are evaluated, and the model is saved.",
    refusal=stream_refusal,
    trainer=StageOptions,
    examples=(
        "dylora stream --config stream",
        "dylora stream --datasets code_alpaca cmake --output_dir runs/skills",
        "dylora stream --checkpoint runs/skills/checkpoint --datasets cpp_headers",
    ),
)
