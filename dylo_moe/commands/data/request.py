"""A command line of `dylora data show` or `dylora data check`, read and checked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from dylo_moe.commands.data.arguments import LookArguments, look_line
from dylo_moe.data.config import DataConfig
from dylo_moe.parsing.parser import build_parser, grouped, parse
from dylo_moe.utils.errors import UsageError


class LookRequest(NamedTuple):
    """What `dylora data show` or `check` was asked for."""

    data: DataConfig
    look: LookArguments


def parse_look(argv: Sequence[str], *, prog: str) -> LookRequest:
    """Read the command line of `dylora data show` or `check`.

    Raises:
        UsageError: for an unknown or refused flag, a value out of range, or where no dataset is named.
    """
    words = list(argv)
    if names := _behind_datasets(words):
        raise UsageError(f"datasets are named right after the command, without --datasets: {prog} {' '.join(names)}")
    count = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    if not count:
        raise UsageError(f"no dataset is named; type it right after the command: {prog} code_alpaca")
    line = look_line(prog)
    data, look = parse(build_parser(line), words[count:], line.refusal, given=["--datasets", *words[:count]])
    if prog.endswith("show") and len(data.datasets) > 1:
        raise UsageError(f"show prints one dataset at a time; leave {' and '.join(data.datasets[1:])} out")
    return LookRequest(data, look)


def _behind_datasets(words: Sequence[str]) -> list[str]:
    """The names that were given with --datasets, as `dylora train` takes them, behind those at their right place."""
    given = ",".join(",".join(values) for flag, values in grouped(words) if flag == "--datasets")
    before = itertools.takewhile(lambda word: not word.startswith("--"), words)
    return [*before, *filter(None, given.split(","))] if given else []
