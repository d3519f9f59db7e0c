"""The flags of `dylora plan`: those of `dylora train`, and how many processes are to train."""

from __future__ import annotations

from dataclasses import dataclass, field

from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.parsing.command_line import CommandLine, refusal_of
from dylo_moe.training.arguments import TrainerOptions


@dataclass
class PlanArguments:
    """What is no flag of `dylora train`, for its launcher says it."""

    num_processes: int = field(
        default=1,
        metadata={
            "help": "Processes that will train together, one a GPU: the plan is of one of them, under DDP, or with "
            "--fsdp true with a share of the base."
        },
    )

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes is {self.num_processes}; it must be at least 1")


PLAN_LINE = CommandLine(
    prog="dylora plan",
    kinds=(PlanArguments, *TRAIN_CONFIGS),
    usage="dylora plan [--config RECIPE] [--FLAG VALUE ...]",
    description="What a training would be, without running it: parameters, steps, memory, size of a checkpoint. It "
    "takes the flags and recipes of `dylora train`.",
    refusal=refusal_of,
    trainer=TrainerOptions,
    examples=(
        "dylora plan --config quickstart",
        "dylora plan --model google/codegemma-2b --num_experts 8 --lora_r 32",
    ),
)
