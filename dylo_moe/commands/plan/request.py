"""A command line of `dylora plan`, read with the recipe that it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dylo_moe.commands.plan.arguments import CPU, CUDA, PLAN_LINE, PlanArguments
from dylo_moe.commands.train.request import Arguments, parse_train
from dylo_moe.parsing.command_line import refuses_nothing
from dylo_moe.parsing.flags import flags_of
from dylo_moe.parsing.parser import Parser, build_parser, parse, plain_options
from dylo_moe.training.trainer_arguments import ArgumentsElsewhere, TrainArguments
from dylo_moe.utils.errors import UsageError


class PlanRequest(NamedTuple):
    """Everything a plan was asked for."""

    arguments: Arguments
    """The arguments of the training."""
    device: str = CPU
    """What the plan is for: "cpu" or "cuda"."""
    num_processes: int = 1
    memory_gb: float | None = None
    """Memory of the device; None: not said."""


def build_plan_parser(*, show_all: bool = False) -> Parser:
    """The parser of `dylora plan`, for its help."""
    return build_parser(PLAN_LINE, TrainArguments, show_all=show_all)


def parse_plan(argv: Sequence[str]) -> PlanRequest:
    """Read the command line and the recipe it names.

    Raises:
        UsageError: for an unknown or refused flag (with the nearest known name), or a value out of range.
    """
    if argv and not argv[0].startswith("-"):
        raise UsageError(f"{argv[0]!r} is no flag; a model is named by --model {argv[0]}, a recipe by --config")
    parser = plain_options(Parser((PlanArguments,), prog=PLAN_LINE.prog, allow_abbrev=False, add_help=False))
    names = {f"--{name}" for name in flags_of(PlanArguments)}
    typed = [(word, word.partition("=")[0] in names) for word in parser.with_values(argv)]
    problems: list[str] = []
    try:
        (plan,) = parse(parser, [word for word, is_own in typed if is_own], refuses_nothing)
    except UsageError as error:
        problems.append(str(error))
        plan = PlanArguments()
    try:
        words = [word for word, is_own in typed if not is_own]
        arguments = parse_train(words, prog=PLAN_LINE.prog, num_processes=plan.num_processes, kind=ArgumentsElsewhere)
    except UsageError as error:
        problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))
    return PlanRequest(arguments, _device(plan.device, arguments.train), plan.num_processes, plan.memory_gb)


def _device(asked: str | None, train: TrainArguments) -> str:
    if asked == CUDA and train.use_cpu:
        raise UsageError("device is cuda, but use_cpu is given too; leave one of them out")
    if asked == CPU and train.fp16:
        raise UsageError("fp16 needs a GPU, and device is cpu; give bf16, or leave both out")
    if asked is not None:
        return asked
    half = train.bf16 or train.fp16
    return CUDA if not train.use_cpu and (half or torch.cuda.is_available()) else CPU
