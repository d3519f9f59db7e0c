"""A command line of `dylora export`, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dylo_moe.commands.export.arguments import EXPORT_LINE, MERGED, ExportArguments
from dylo_moe.parsing.known_expert import parse_with_expert
from dylo_moe.parsing.parser import build_parser
from dylo_moe.utils.errors import UsageError

ONLY_FOR_MERGED = ("expert", "mixture", "dtype")

ONLY_FOR_MEASURING = ("datasets", "data_dir", "eval_subset", "batch_size", "seed", "bf16")


class ExportRequest(NamedTuple):
    """What `dylora export` was asked for."""

    checkpoint: str
    options: ExportArguments


def parse_export(argv: Sequence[str]) -> ExportRequest:
    """Read the command line of `dylora export`.

    Raises:
        UsageError: for a missing checkpoint, an unknown flag, a value out of range, or a flag that would have no
            effect.
    """
    checkpoint, options, given = parse_with_expert(argv, build_parser(EXPORT_LINE))
    reasons = []
    if options.to != MERGED:
        reasons.append((given & set(ONLY_FOR_MERGED), f"--to {options.to} writes every expert as it is"))
    if options.no_measure:
        reasons.append((given & set(ONLY_FOR_MEASURING), "with --no_measure nothing is measured"))
    idle = [f"{', '.join(f'--{name}' for name in sorted(names))}: {reason}" for names, reason in reasons if names]
    if idle:
        raise UsageError("these flags would change nothing: " + "; ".join(idle))
    return ExportRequest(checkpoint, options)
