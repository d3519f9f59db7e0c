"""The flags of `dylora plan`: those of `dylora train`, and how many processes are to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dylo_moe.commands.parsing import Parser, plain_options, refusal_of, training_parser
from dylo_moe.commands.train.arguments import TRAIN_CONFIGS, Arguments, parse_train
from dylo_moe.training.arguments import TrainArguments

PROG = "dylora plan"


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


class PlanRequest(NamedTuple):
    """Everything a plan was asked for."""

    arguments: Arguments
    """Of the training."""
    num_processes: int


def build_plan_parser(*, show_all: bool = False) -> Parser:
    """The parser of `dylora plan`, for its help."""
    return training_parser(
        PROG,
        (PlanArguments, *TRAIN_CONFIGS, TrainArguments),
        description="What a training would be, without running it: parameters, steps, memory, size of a checkpoint. "
        "It takes the flags and recipes of `dylora train`.",
        refusal=refusal_of,
        show_all=show_all,
    )


def parse_plan(argv: Sequence[str]) -> PlanRequest:
    """Read the command line and the recipe it names.

    Raises:
        UsageError: for an unknown or refused flag (with the nearest known name), or a value out of range.
    """
    own = plain_options(Parser((PlanArguments,), prog=PROG, allow_abbrev=False, add_help=False))
    plan, words = own.parse_args_into_dataclasses(list(argv), return_remaining_strings=True, look_for_args_file=False)
    count = plan.num_processes
    return PlanRequest(parse_train(words, prog=PROG, num_processes=count), count)
