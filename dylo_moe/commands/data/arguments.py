"""The flags of `dylora data show` and `dylora data check`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dylo_moe.base.loading import DEFAULT_BASE
from dylo_moe.commands.parsing import Parser, Refusal, parse, plain_options
from dylo_moe.data.config import DataConfig
from dylo_moe.utils.errors import UsageError

NOT_SHOWN = {
    "training_subset",
    "eval_subset",
    "interleaved_sampling",
    "mix",
    "packing",
    "decontaminate",
    "per_device_train_batch_size",
}
"""Flags that change nothing of what `dylora data show` prints."""


@dataclass
class LookArguments:
    """Flags of `dylora data show` and `dylora data check` beside those of the data."""

    model: str = field(
        default=DEFAULT_BASE, metadata={"help": "Whose tokenizer and chat template: as in dylora train."}
    )
    examples: int = field(default=3, metadata={"help": "Examples to print (show)."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "For the share of padding (check)."})
    seed: int = field(default=42, metadata={"help": "Which examples are printed; how check splits and mixes."})

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("examples", "per_device_train_batch_size")
            if getattr(self, name) < 1
        ]
        if problems:
            raise ValueError("; ".join(problems))


class LookRequest(NamedTuple):
    """What `dylora data show` or `check` was asked for."""

    data: DataConfig
    look: LookArguments


def build_look_parser(prog: str) -> Parser:
    """The parser of `dylora data show` and `dylora data check`."""
    what = "Print examples as the model will see them" if prog.endswith("show") else "Count what training would be on"
    parser = Parser(
        (DataConfig, LookArguments),
        prog=prog,
        allow_abbrev=False,
        add_help=False,
        usage=f"{prog} NAME{'' if prog.endswith('show') else '...'} [--FLAG VALUE ...]",
        description=f"{what}. NAME is as in dylora train --datasets.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for action in parser._actions:
        if _look_refusal(prog)(action.dest):
            action.help = argparse.SUPPRESS
    return plain_options(parser)


def parse_look(argv: Sequence[str], *, prog: str) -> LookRequest:
    """Read the command line of `dylora data show` or `check`.

    Raises:
        UsageError: as `parse_train`, and where no dataset is named.
    """
    words = list(argv)
    count = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    if not count:
        raise UsageError(f"no dataset is named; type it right behind the command: {prog} code_alpaca")
    refusal = _look_refusal(prog)
    data, look = parse(build_look_parser(prog), words[count:], refusal, given=["--datasets", *words[:count]])
    if prog.endswith("show") and len(data.datasets) > 1:
        raise UsageError(f"show prints one dataset at a time; leave {' and '.join(data.datasets[1:])} out")
    return LookRequest(data, look)


def _look_refusal(prog: str) -> Refusal:
    def refusal(name: str) -> str | None:
        if name == "datasets":
            return f"name the datasets right behind {prog}"
        if name in NOT_SHOWN and prog.endswith("show"):
            return "it changes nothing of what is shown"
        return "it is for dylora data show" if name == "examples" and prog.endswith("check") else None

    return refusal
