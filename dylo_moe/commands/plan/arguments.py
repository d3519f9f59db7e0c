"""The flags of `dylora plan`: those of `dylora train`, and what the plan is for: device, memory, processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.parsing.command_line import CommandLine, refusal_of
from dylo_moe.training.arguments import TrainerOptions

CPU, CUDA = "cpu", "cuda"


@dataclass
class PlanArguments:
    """What is no flag of `dylora train`, because the machine that trains and its launcher say it."""

    device: str | None = field(
        default=None,
        metadata={
            "help": "What the plan is for: cuda or cpu. Default: cuda with --bf16 or --fp16 and without --use_cpu, or "
            "where this machine has a GPU; else cpu.",
            "choices": [CPU, CUDA],
        },
    )
    memory_gb: float | None = field(
        default=None,
        metadata={
            "help": "Memory of that device, in GB of 10^9 bytes; the plan says whether the run fits, and what to "
            "change where it does not. Default: that of this machine, or for cuda without a GPU 16, 24, 40 and 80."
        },
    )
    num_processes: int = field(
        default=1,
        metadata={
            "help": "Processes that will train together, one a GPU: the plan is of one of them, under DDP, or with "
            "--fsdp true with a share of the base."
        },
    )

    def __post_init__(self) -> None:
        problems = []
        if self.num_processes < 1:
            problems.append(f"num_processes is {self.num_processes}; it must be at least 1")
        if self.memory_gb is not None and not 0 < self.memory_gb < float("inf"):
            problems.append(f"memory_gb is {self.memory_gb}; it must be above 0")
        if problems:
            raise ValueError("; ".join(problems))


PLAN_LINE = CommandLine(
    prog="dylora plan",
    kinds=(PlanArguments, *TRAIN_CONFIGS),
    usage="dylora plan [--config RECIPE] [--FLAG VALUE ...]",
    description="What a training would be, without running it: parameters, steps, memory and whether it fits, size of "
    "a checkpoint. It takes the flags and recipes of `dylora train`.",
    refusal=refusal_of,
    trainer=TrainerOptions,
    examples=(
        "dylora plan --config quickstart",
        "dylora plan --model google/codegemma-2b --num_experts 8 --lora_r 32",
    ),
)
