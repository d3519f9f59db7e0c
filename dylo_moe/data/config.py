"""The options of the data: what to train on, and how it becomes training rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from dylo_moe.utils.checks import choice_problems, is_number, is_share
from dylo_moe.utils.words import split_at_commas

DEFAULT_DATASETS = ("code_alpaca", "mbpp")

RESPONSE = "response"

ALL = "all"

CUT = "cut"

DROP = "drop"

MIN_SEQ_LENGTH = 16

MAX_SEARCH = 50
"""The largest percentage of rows that can be kept for a search."""

ROLES = ("system", "history", "prompt", "input", "tests", "response", "messages", "text")
"""The roles that a column of a dataset can play."""


class ColumnChoice(NamedTuple):
    """One `ROLE=COLUMN` of `columns`: which column of a dataset plays a role."""

    dataset: str | None
    """The dataset that the choice applies to; None for every dataset given by path or hub id."""
    role: str
    column: str


@dataclass(kw_only=True)
class DataConfig:
    """What to train on, and how it becomes training rows; its fields are flags of `dylora train` and `dylora data`.

    An item of a list may hold several values separated by commas, as typed on the command line.

    Raises:
        ValueError: for values out of range; one message holds all problems of a config.
    """

    datasets: list[str] = field(
        default_factory=lambda: list(DEFAULT_DATASETS),
        metadata={
            "help": "Names that `dylora data list` shows, paths of files or folders, or hub ids "
            "(OWNER/NAME, OWNER/NAME:CONFIG, each with @REVISION). Comma- or space-separated."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "A local mirror: one folder per dataset name, holding parquet, json or jsonl files."},
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Which columns to read where they are not recognised: prompt=COLUMN,response=COLUMN, text=COLUMN "
            "or messages=COLUMN; also system, history, input, tests. DATASET.prompt=COLUMN is for one dataset."
        },
    )
    max_seq_length: int = field(default=512, metadata={"help": "Longest training row, in tokens."})
    overlong: str = field(
        default=CUT,
        metadata={
            "help": "Rows over max_seq_length: cut at the start of their prompt, or drop. Counted and shown.",
            "choices": [CUT, DROP],
        },
    )
    loss_on: str = field(
        default=RESPONSE,
        metadata={
            "help": "Tokens that are trained: of the response, or of the prompt too (all).",
            "choices": [RESPONSE, ALL],
        },
    )
    training_subset: float = field(default=100.0, metadata={"help": "Percent of each dataset's training rows to use."})
    eval_subset: float = field(default=100.0, metadata={"help": "Percent of each dataset's held-out rows to use."})
    search_subset: float = field(
        default=0.0,
        metadata={
            "help": "Percent of each dataset's rows, in whole documents, that no seed trains or holds out: "
            "`dylora compare` searches settings on them."
        },
    )
    interleaved_sampling: bool = field(
        default=False,
        metadata={
            "help": "Every dataset gives an equal share of an epoch's rows, small ones several times over. Without it "
            "datasets weigh as many rows as they have."
        },
    )
    mix: list[str] = field(
        default_factory=list,
        metadata={"help": "Shares of an epoch's rows, of all datasets, adding up to 1: a=0.7,b=0.3."},
    )
    packing: bool = field(
        default=False, metadata={"help": "Several texts in one row, kept apart, so that little is padding."}
    )
    decontaminate: bool = field(
        default=False, metadata={"help": "Remove rows that overlap with HumanEval or the test split of MBPP."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenise; default: one for each core."}
    )

    def __post_init__(self) -> None:
        problems = []
        for name in ("datasets", "columns", "mix"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                problems.append(f"{name} is {value!r}; it must be a list of strings")
            else:
                setattr(self, name, split_at_commas(value))
        if not self.datasets:
            problems.append("datasets is empty; give at least one dataset")
        if not isinstance(self.max_seq_length, int) or self.max_seq_length < MIN_SEQ_LENGTH:
            problems.append(f"max_seq_length is {self.max_seq_length!r}; it must be at least {MIN_SEQ_LENGTH} tokens")
        for name in ("training_subset", "eval_subset"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value <= 100:
                problems.append(f"{name} is {value!r}; it must be a percentage above 0 and at most 100")
        if not is_number(self.search_subset) or not 0 <= self.search_subset <= MAX_SEARCH:
            problems.append(f"search_subset is {self.search_subset!r}; it must be a percentage from 0 to {MAX_SEARCH}")
        problems += choice_problems(self)
        workers = self.preprocessing_num_workers
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            problems.append(f"preprocessing_num_workers is {workers!r}; it must be at least 1")
        if not problems:
            problems += self._pair_problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _pair_problems(self) -> list[str]:
        problems = []
        for pair in self.columns:
            left, sign, column = pair.partition("=")
            if not sign or not column or left.rpartition(".")[2] not in ROLES:
                problems.append(f"columns has {pair!r}; it must be ROLE=COLUMN, with a role of {', '.join(ROLES)}")
        for pair in self.mix:
            name, sign, share = pair.rpartition("=")
            if not sign or not name or not is_share(share):
                problems.append(f"mix has {pair!r}; it must be DATASET=SHARE, with a share above 0 and below 1")
        if not problems and self.mix:
            names = [pair.rpartition("=")[0] for pair in self.mix]
            if len(set(names)) < len(names):
                problems.append(f"mix names a dataset twice: {', '.join(names)}")
            total = sum(self.shares.values())
            if abs(total - 1) > 1e-6:
                problems.append(f"the shares of mix add up to {total:g}; they must add up to 1")
        if len(self.datasets) == 1 and (self.mix or self.interleaved_sampling):
            option = "mix" if self.mix else "interleaved_sampling"
            problems.append(f"{option} has nothing to mix: there is one dataset, {self.datasets[0]!r}")
        return problems

    @property
    def column_choices(self) -> list[ColumnChoice]:
        """The entries of `columns`, parsed."""
        choices = []
        for pair in self.columns:
            left, _, column = pair.partition("=")
            dataset, _, role = left.rpartition(".")
            choices.append(ColumnChoice(dataset or None, role, column))
        return choices

    @property
    def shares(self) -> dict[str, float]:
        """The entries of `mix`, parsed: each dataset's share by its name; empty without `mix`."""
        return {name: float(share) for name, _, share in (pair.rpartition("=") for pair in self.mix)}
