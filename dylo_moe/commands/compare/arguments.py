"""The flags of `dylora compare`: those of `dylora train`, and what is compared."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.evaluation.arguments import LOSSES, TASKS, EvalArguments
from dylo_moe.parsing.command_line import CommandLine, refusal_of
from dylo_moe.training.arguments import TrainerOptions

BASE_ARM = "base"

OURS = "ours"

ARMS = {
    BASE_ARM: "the base",
    "lora_total": "one LoRA of equal total size",
    "lora_active": "one LoRA of equal active size",
    "uniform": "uniform routing",
    "random": "random routing",
    OURS: "ours",
}
"""The arms of a comparison in the order of the table, each with its title for readers."""

NOT_OFFERED = {
    "seed": "give --seeds",
    "router_policy": "every policy is an arm of its own; --arms chooses",
    "resume_from_checkpoint": "type the same command again, and it resumes",
    "wandb_checkpoint_artifact": "type the same command again, and it resumes",
    "early_stopping_patience": "all arms train on the same tokens",
    "early_stopping_threshold": "all arms train on the same tokens",
    "load_best_model_at_end": "it would choose a checkpoint by the very rows that the arms are compared on",
    "eval_benchmark": "every arm is evaluated once it is trained: --tasks",
    "eval_benchmark_steps": "every arm is evaluated once it is trained: --tasks",
    "include_num_input_tokens_seen": "tokens are always counted here",
}
"""Flags of `dylora train` that would have no effect or a wrong one here, each with the reason."""

OF_CODE = ("timeout_seconds", "memory_mib", "limit", "max_new_tokens")
"""Flags of `dylora eval` that have no meaning without a task that runs code."""

EVAL = {item.name: item for item in fields(EvalArguments)}


@dataclass
class CompareArguments:
    """The flags that `dylora compare` has besides those of `dylora train`.

    Raises:
        ValueError: for values out of range; all problems in one message.
    """

    seeds: list[str] = field(
        default_factory=lambda: ["1", "2", "3"],
        metadata={"help": "Seeds with each of which every arm is trained; a seed also decides what is held out."},
    )
    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": "The arms that are compared: " + ", ".join(ARMS) + "."}
    )
    tasks: list[str] = field(
        default_factory=lambda: [LOSSES],
        metadata={"help": "The evaluations: " + ", ".join(TASKS) + "; losses are always measured."},
    )
    timeout_seconds: float = field(
        default=EvalArguments.timeout_seconds, metadata=dict(EVAL["timeout_seconds"].metadata)
    )
    memory_mib: int = field(default=EvalArguments.memory_mib, metadata=dict(EVAL["memory_mib"].metadata))
    limit: int | None = field(default=None, metadata=dict(EVAL["limit"].metadata))
    max_new_tokens: int = field(default=EvalArguments.max_new_tokens, metadata=dict(EVAL["max_new_tokens"].metadata))

    def __post_init__(self) -> None:
        problems = []
        for name in ("seeds", "arms", "tasks"):
            values = [part.strip() for item in getattr(self, name) for part in str(item).split(",") if part.strip()]
            setattr(self, name, list(dict.fromkeys(values)))
        if not self.seeds or not all(seed.isdigit() for seed in self.seeds):
            problems.append(f"seeds is {','.join(self.seeds) or 'empty'}; it must be whole numbers from 0 on")
        for name, known in (("arms", ARMS), ("tasks", TASKS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                problems.append(f"{name} has {', '.join(unknown)}; there are {', '.join(known)}")
        if not unknown and (OURS not in self.arms or len(self.arms) < 2):
            problems.append(f"arms is {','.join(self.arms)}; it must have {OURS}, and something to compare with")
        if problems:
            raise ValueError("; ".join(problems))
        self.arms = [arm for arm in ARMS if arm in self.arms]

    @property
    def benchmarks(self) -> list[str]:
        """The tasks that run code."""
        return [task for task in self.tasks if task != LOSSES]


def compare_refusal(name: str) -> str | None:
    """Why `dylora compare` does not offer a flag of that name; None where it does."""
    return NOT_OFFERED.get(name) or refusal_of(name)


COMPARE_LINE = CommandLine(
    prog="dylora compare",
    kinds=(*TRAIN_CONFIGS, CompareArguments),
    usage="dylora compare [--config RECIPE] [--FLAG VALUE ...]",
    description="Train and evaluate on the same data, tokens and seeds: the base, one LoRA of equal total parameters, "
    "one of equal active parameters, uniform routing, random routing, and ours; one table says whether ours wins. "
    "Started again after a kill, it resumes where it was.",
    refusal=compare_refusal,
    trainer=TrainerOptions,
    examples=(
        "dylora compare --config compare --output_dir runs/compare",
        "dylora compare --config compare --seeds 1 2 3 --arms lora_total ours --output_dir runs/seeds",
    ),
)
