"""The flags of `dylora data show` and `dylora data check`."""

from __future__ import annotations

from dataclasses import dataclass, field

from dylo_moe.data.config import DataConfig
from dylo_moe.parsing.command_line import CommandLine, Refusal
from dylo_moe.training.arguments import DEFAULT_BASE

NOT_SHOWN = {
    "training_subset",
    "eval_subset",
    "interleaved_sampling",
    "mix",
    "packing",
    "decontaminate",
    "per_device_train_batch_size",
}
"""Flags that do not change what `dylora data show` prints."""


@dataclass
class LookArguments:
    """The flags that `dylora data show` and `dylora data check` have besides those of the data."""

    model: str = field(
        default=DEFAULT_BASE,
        metadata={"help": "The model whose tokenizer and chat template are used, as in dylora train."},
    )
    examples: int = field(default=3, metadata={"help": "Number of examples to print (show)."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Rows of a batch, for the share of padding (check)."}
    )
    seed: int = field(
        default=42, metadata={"help": "Seed of the choice of examples (show), and of the split and the mixing (check)."}
    )

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("examples", "per_device_train_batch_size")
            if getattr(self, name) < 1
        ]
        if problems:
            raise ValueError("; ".join(problems))


def look_line(prog: str) -> CommandLine:
    """The flags of `dylora data show` or `dylora data check`, as `prog` says."""
    is_show = prog.endswith("show")
    what = "Print examples as the model will see them" if is_show else "Count the rows that training would use"
    return CommandLine(
        prog=prog,
        kinds=(DataConfig, LookArguments),
        usage=f"{prog} NAME{'' if is_show else '...'} [--FLAG VALUE ...]",
        description=f"{what}. NAME is as in dylora train --datasets.",
        examples=(
            f"{prog} code_alpaca",
            f"{prog} {'my.jsonl --examples 5' if is_show else 'code_alpaca mbpp my.jsonl'}",
        ),
        refusal=_look_refusal(prog),
    )


def _look_refusal(prog: str) -> Refusal:
    def refusal(name: str) -> str | None:
        if name == "datasets":
            return f"name the datasets right after {prog}"
        if name in NOT_SHOWN and prog.endswith("show"):
            return "it does not change what is shown"
        return "it is for dylora data show" if name == "examples" and prog.endswith("check") else None

    return refusal
