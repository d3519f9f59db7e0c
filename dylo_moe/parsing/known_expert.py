"""Read a command line with a checkpoint, and name an unknown expert together with the other mistakes in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dylo_moe.model.checkpoint import CheckpointError, read_manifest
from dylo_moe.model.manifest import expert_problem
from dylo_moe.parsing.parser import Parser, parse_with_checkpoint
from dylo_moe.utils.errors import UsageError


def parse_with_expert(argv: Sequence[str], parser: Parser) -> tuple[str, Any, set[str]]:
    """Read `CHECKPOINT [--FLAG VALUE ...]` as `parse_with_checkpoint` does.

    Raises:
        UsageError: as `parse_with_checkpoint` does; where there is a mistake, and the checkpoint has no expert of the
            name behind --expert, the message says that too.
    """
    try:
        return parse_with_checkpoint(argv, parser)
    except UsageError as error:
        problem = _expert_problem(argv, parser)
        if problem is None:
            raise
        raise UsageError(f"{error}; {problem}") from error


def _expert_problem(argv: Sequence[str], parser: Parser) -> str | None:
    alone, words = parser.split(argv)
    names = [word.partition("=")[2] for word in words if word.startswith("--expert=")]
    if len(alone) != 1 or not names:
        return None
    try:
        return expert_problem(read_manifest(alone[0]), names[-1])
    except CheckpointError:
        return None
