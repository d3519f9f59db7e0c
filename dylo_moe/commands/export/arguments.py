"""The flags of `dylora export`, which are typed after the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from dylo_moe.parsing.command_line import CommandLine
from dylo_moe.routing.config import BASE
from dylo_moe.utils.checks import COUNT, PERCENT, SEED, range_problems
from dylo_moe.utils.words import split_at_commas

VLLM, PEFT, MERGED = "vllm", "peft", "merged"

MEASURED = "measured"
"""The value of --mixture that stands for the shares of tokens which the router itself sends to each expert."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ExportArguments:
    """The flags of `dylora export`, which are typed after the checkpoint.

    Raises:
        ValueError: for values out of range; all problems in one message.
    """

    to: str = field(
        metadata={
            "help": "vllm: one adapter for each expert, and the command that serves them, one expert a request. "
            "peft: one adapter for each expert as stock PEFT loads it, an aLoRA adapter where prompts are read by the "
            "base. merged: one plain Transformers model, with one expert or a fixed mixture inside its weights.",
            "choices": [VLLM, PEFT, MERGED],
        }
    )
    output: str = field(metadata={"help": "The folder to write, new or empty."})
    expert: str | None = field(
        default=None, metadata={"help": "With --to merged: the expert that is merged into the weights."}
    )
    mixture: str | None = field(
        default=None,
        metadata={
            "help": "With --to merged: experts and their weights, which add up to 1: a=0.7,b=0.3. One may be base, the "
            "unchanged model. measured: each expert's share of the held-out tokens, as the router sends them."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "With --to merged: the dtype of the weights; default: as in the base's files.",
            "choices": list(DTYPES),
        },
    )
    no_measure: bool = field(
        default=False,
        metadata={
            "help": "Do not measure what is lost against routing each token; the export then says that it is not known."
        },
    )
    datasets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Datasets to measure on; default: those of the checkpoint's run, with the same held-out rows."
        },
    )
    data_dir: str | None = field(default=None, metadata={"help": "A local mirror of datasets, as in dylora train."})
    eval_subset: float | None = field(
        default=None, metadata={"help": "Percent of each dataset's held-out rows; default: as in the checkpoint's run."}
    )
    batch_size: int = field(default=16, metadata={"help": "Number of rows that are measured together."})
    seed: int = field(default=42, metadata={"help": "Seed of the resampling for the intervals."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Whether the checkpoint is measured with its base in bfloat16; default: as it was trained."},
    )

    def __post_init__(self) -> None:
        self.datasets = split_at_commas(self.datasets)
        problems = range_problems(vars(self), {"batch_size": COUNT, "eval_subset": PERCENT, "seed": SEED})
        if self.to == MERGED and (self.expert is None) == (self.mixture is None):
            given = "neither is given" if self.expert is None else "both are given"
            problems.append(f"--to merged needs --expert or --mixture, and one of them only; {given}")
        if self.expert == BASE:
            problems.append(f"expert is {BASE!r}, the unchanged model, which needs no export")
        if self.no_measure and self.mixture == MEASURED:
            problems.append("mixture is measured, which --no_measure rules out; give the weights")
        if problems:
            raise ValueError("; ".join(problems))


EXPORT_LINE = CommandLine(
    prog="dylora export",
    kinds=(ExportArguments,),
    usage="dylora export CHECKPOINT --to vllm --output FOLDER\n"
    "       dylora export CHECKPOINT --to peft --output FOLDER\n"
    "       dylora export CHECKPOINT --to merged --expert NAME --output FOLDER\n"
    "       dylora export CHECKPOINT --to merged --mixture MIXTURE --output FOLDER",
    description="Write a checkpoint (a run's folder, or the folder that holds dylora.json) for engines that do not "
    "route each token, and say what that loses: the loss on held-out rows is measured both ways.",
    examples=(
        "dylora export runs/code/checkpoint --to vllm --output served",
        "dylora export runs/code/checkpoint --to merged --expert expert_0 --output plain",
    ),
)


def mixture_weights(text: str, members: Collection[str]) -> dict[str, float]:
    """Read the value of --mixture, such as `a=0.7,b=0.3`; returns the weight of each member.

    Args:
        members: the names of the checkpoint's experts.

    Raises:
        ValueError: naming every entry that is not a member with a weight, and for weights that are not a distribution.
            Like the router's weights, they are above 0 and add up to 1, so that experts are neither weakened nor
            amplified.
    """
    known, problems = {*members, BASE}, []
    weights: dict[str, float] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, _, value = part.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if name in weights:
            problems.append(f"it names {name!r} twice")
        elif name not in known:
            problems.append(f"{part!r} names no member; there are {', '.join([*members, BASE])}")
        elif not 0 < weight <= 1:
            problems.append(f"{part!r} must be NAME=WEIGHT, with a weight above 0 and at most 1")
        else:
            weights[name] = weight
    if not problems and not abs(sum(weights.values()) - 1) <= 1e-6:
        problems.append(f"its weights add up to {sum(weights.values()):g}; they must add up to 1")
    if not problems and not weights.keys() - {BASE}:
        problems.append("it is the base alone, which needs no export")
    if problems:
        raise ValueError(f"mixture is {text!r}: " + "; ".join(problems))
    return weights
