"""A command line of `dylora plan`, read with the recipe that it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dylo_moe.commands.plan.arguments import PLAN_LINE, PlanArguments
from dylo_moe.commands.train.request import Arguments, parse_train
from dylo_moe.parsing.parser import Parser, build_parser, plain_options
from dylo_moe.training.trainer_arguments import TrainArguments


class PlanRequest(NamedTuple):
    """Everything a plan was asked for."""

    arguments: Arguments
    """The arguments of the training."""
    num_processes: int


def build_plan_parser(*, show_all: bool = False) -> Parser:
    """The parser of `dylora plan`, for its help."""
    return build_parser(PLAN_LINE, TrainArguments, show_all=show_all)


def parse_plan(argv: Sequence[str]) -> PlanRequest:
    """Read the command line and the recipe it names.

    Raises:
        UsageError: for an unknown or refused flag (with the nearest known name), or a value out of range.
    """
    own = plain_options(Parser((PlanArguments,), prog=PLAN_LINE.prog, allow_abbrev=False, add_help=False))
    plan, words = own.parse_args_into_dataclasses(list(argv), return_remaining_strings=True, look_for_args_file=False)
    count = plan.num_processes
    return PlanRequest(parse_train(words, prog=PLAN_LINE.prog, num_processes=count), count)
