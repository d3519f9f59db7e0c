"""A command line of `dylora eval`, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

from dylo_moe.commands.eval.arguments import EVAL_LINE
from dylo_moe.evaluation.arguments import LOSSES, ONLY_FOR_CODE, ONLY_FOR_LOSSES, ONLY_FOR_SAMPLES, EvalArguments
from dylo_moe.parsing.known_expert import parse_with_expert
from dylo_moe.parsing.parser import build_parser
from dylo_moe.utils.errors import UsageError


class EvalRequest(NamedTuple):
    """What `dylora eval` was asked for."""

    checkpoint: str
    options: EvalArguments


def parse_eval(argv: Sequence[str]) -> EvalRequest:
    """Read the command line of `dylora eval`.

    Raises:
        UsageError: for a missing checkpoint, an unknown flag, a value out of range, a flag that would have no effect,
            or tasks that run code without --allow_code_execution.
    """
    checkpoint, options, given = parse_with_expert(argv, build_parser(EVAL_LINE))
    check_given(options, given)
    check_leave(options)
    return EvalRequest(checkpoint, options)


def check_given(options: EvalArguments, given: set[str]) -> None:
    """Raise UsageError for flags that would have no effect on the chosen tasks."""
    known = {item.name for item in fields(EvalArguments)}
    reasons: list[tuple[set[str], str]] = []
    if LOSSES not in options.tasks:
        reasons.append((given & set(ONLY_FOR_LOSSES), f"tasks is {','.join(options.tasks)}, without losses"))
    if not options.benchmarks:
        reasons.append((given & set(ONLY_FOR_CODE), f"tasks is {','.join(options.tasks)}, which runs no code"))
    elif not options.num_samples:
        reasons.append((given & set(ONLY_FOR_SAMPLES), "num_samples is 0, so nothing is sampled"))
    idle = [
        f"{', '.join(f'--{name}' for name in sorted(names))} would change nothing: {reason}"
        for names, reason in reasons
        if names & known
    ]
    if idle:
        raise UsageError("; ".join(idle))


def check_leave(options: EvalArguments) -> None:
    """Raise UsageError where a task runs generated code and --allow_code_execution is not given."""
    if options.benchmarks and not options.allow_code_execution:
        verb = "runs" if len(options.benchmarks) == 1 else "run"
        raise UsageError(
            f"{' and '.join(options.benchmarks)} {verb} programs that the model writes and no person has read: add "
            "--allow_code_execution to let each of them run, isolated from your files and the network (--sandbox: how)"
        )
