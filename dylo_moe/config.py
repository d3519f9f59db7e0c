"""Every knob of ours, in dataclasses that check themselves.

What belongs to a neighbour stays with it: an expert's rank, alpha, dropout and targets are PEFT's
`LoraConfig`, the training loop's settings are the Trainer's arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

EMBEDDINGS = "embeddings"
FINAL = "final"
TOKEN = "token"
SEQUENCE = "sequence"
LEARNED = "learned"
UNIFORM = "uniform"
RANDOM = "random"

BASE = "base"
"""The member of a growing pool that stands for the unchanged base: a gate row, and no adapter."""

MAHALANOBIS = "mahalanobis"
COSINE = "cosine"
CONSOLIDATE = "consolidate"
SKIP = "skip"
GROW = "grow"
FRESH = "fresh"
NEAREST = "nearest"

NUM_EXPERTS = 4
LORA_R = 16
LORA_ALPHA = 32
LORA_DROPOUT = 0.05
BALANCE_COEFFICIENT = 0.01

DEFAULT_DATASETS = ("code_alpaca", "mbpp")
RESPONSE = "response"
ALL = "all"
CUT = "cut"
DROP = "drop"
MIN_SEQ_LENGTH = 16


OF_LEARNING = ("z_loss_coefficient", "entropy_coefficient", "temperature")
OF_CHOOSING = ("top_k", "granularity", "router_half_life")
"""Fields of `RouterConfig` that shape how a gate learns, and what each token's choice follows from."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens are sent to experts.

    Raises:
        ValueError: for values out of range; all problems of one config in one message.
    """

    top_k: int = 1
    """Experts per token in sparse delegation, from 1 to the number of experts."""

    router_layer: str | int | float = EMBEDDINGS
    """Where the router reads: "embeddings", a layer's index (the hidden states entering that layer), or
    a fraction of the depth between 0 and 1. Layers below it carry no adapters. "final": the last hidden
    states of a pass of the base alone, before the pass with the experts; twice the work."""

    granularity: str = TOKEN
    """"token": every token is sent on its own. "sequence": a text is sent as a whole, by what the router
    reads at the last token of its prompt, and that holds for all of it, generated tokens included."""

    policy: str = LEARNED
    """"learned": the gate decides, and learns. For comparison, with a gate that stays as it was drawn: "uniform": every
    token goes to all experts alike; "random": to `top_k` experts alike, by a fixed pseudo-random function of what the
    gate reads, so that a text is always routed the same way and its content does not matter."""

    router_half_life: float = 32.0
    """Half-life, in tokens, of the causal exponential mean that the gate reads."""

    temperature: float = 1.0
    """Divides the gate logits of dense collaboration; towards 0 it becomes top-1."""

    z_loss_coefficient: float = 0.0
    """Weight of the router z-loss, mean(logsumexp(logits)^2)."""

    entropy_coefficient: float = 0.0
    """Weight of the mean entropy of a token's routing, in nats; positive makes the router surer."""

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
            problems.append(f"top_k is {self.top_k!r}; it must be a whole number of at least 1")
        if not _is_router_layer(self.router_layer):
            problems.append(
                f"router_layer is {self.router_layer!r}; it must be 'embeddings', a layer's index (0 or more), "
                "a fraction of the depth between 0 and 1, or 'final'"
            )
        if self.granularity not in (TOKEN, SEQUENCE):
            problems.append(f"granularity is {self.granularity!r}; it must be 'token' or 'sequence'")
        if self.policy not in (LEARNED, UNIFORM, RANDOM):
            problems.append(f"policy is {self.policy!r}; it must be 'learned', 'uniform' or 'random'")
        for name in ("router_half_life", "temperature"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) < math.inf:
                problems.append(f"{name} is {getattr(self, name)!r}; it must be a finite number above 0")
        for name in ("z_loss_coefficient", "entropy_coefficient"):
            if not _is_number(getattr(self, name)) or not math.isfinite(getattr(self, name)):
                problems.append(f"{name} is {getattr(self, name)!r}; it must be a finite number")
        problems += [] if problems else self._policy_problems()
        if problems:
            raise ValueError("RouterConfig: " + "; ".join(problems))

    def _policy_problems(self) -> list[str]:
        """What cannot apply where nothing is learned, or, with "uniform", nothing is chosen."""
        without_meaning = {LEARNED: (), RANDOM: OF_LEARNING, UNIFORM: (*OF_LEARNING, *OF_CHOOSING)}[self.policy]
        defaults = {item.name: item.default for item in fields(self)}
        problems = [
            f"{name} is {getattr(self, name)!r}, which has no meaning with policy {self.policy!r}; leave it out"
            for name in without_meaning
            if getattr(self, name) != defaults[name]
        ]
        if self.policy == UNIFORM and self.reads_final:
            problems.append("router_layer is 'final', which has no meaning with policy 'uniform'; leave it out")
        return problems

    @property
    def is_learned(self) -> bool:
        """Whether the gate decides."""
        return self.policy == LEARNED

    @property
    def reads_final(self) -> bool:
        """Whether a pass of the base alone comes first."""
        return self.router_layer == FINAL

    @property
    def per_sequence(self) -> bool:
        """Whether a text is routed as a whole."""
        return self.granularity == SEQUENCE

    def layer_index(self, num_layers: int) -> int:
        """Index of the first layer that carries experts, in a model of `num_layers` layers; the routing is
        known as that layer begins.

        Raises:
            ValueError: when the index is not below `num_layers`.
        """
        if self.router_layer in (EMBEDDINGS, FINAL):
            return 0
        if isinstance(self.router_layer, float):
            return int(self.router_layer * num_layers)
        index = int(self.router_layer)
        if index >= num_layers:
            raise ValueError(
                f"router_layer is {index}, but the base has {num_layers} layers: use 0 to {num_layers - 1}, "
                "so that at least one layer is left to carry experts"
            )
        return index


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """When a pool grows, and how.

    Raises:
        ValueError: for values out of range; all problems of one config in one message.
    """

    novelty: str = MAHALANOBIS
    """How far data lies from what is known: "mahalanobis", or "cosine" on centred features."""

    false_alarm_rate: float = 0.01
    """Share of samples of known skills that are taken for new ones; mahalanobis is calibrated to it."""

    similarity_threshold: float = 0.75
    """With "cosine": data less alike than this to every known skill is new."""

    known_skill: str = CONSOLIDATE
    """Data of a known skill trains its expert at the low rate ("consolidate"), nothing ("skip"), or a new expert all
    the same ("grow")."""

    start_from: str = NEAREST
    """A new expert begins with zero delta ("fresh"), or as a copy of the nearest skill's expert ("nearest")."""

    def __post_init__(self) -> None:
        problems = []
        choices = {
            "novelty": (MAHALANOBIS, COSINE),
            "known_skill": (CONSOLIDATE, SKIP, GROW),
            "start_from": (FRESH, NEAREST),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(map(repr, allowed))}")
        rate, similarity = self.false_alarm_rate, self.similarity_threshold
        if not _is_number(rate) or not 0 < rate < 1:
            problems.append(f"false_alarm_rate is {rate!r}; it must be a number above 0 and below 1")
        if not _is_number(similarity) or not -1 < similarity < 1:
            problems.append(f"similarity_threshold is {similarity!r}; it must be a number above -1 and below 1")
        if problems:
            raise ValueError("GrowthConfig: " + "; ".join(problems))


class ColumnChoice(NamedTuple):
    """One `ROLE=COLUMN` of `columns`: which column of a dataset plays a role."""

    dataset: str | None
    """The dataset it is for; None: all those given by path or hub id."""
    role: str
    column: str


@dataclass(kw_only=True)
class DataConfig:
    """What to train on, and how it becomes training rows. The flags of `dylora train` and `dylora data`.

    Lists may hold several values separated by commas, as typed.

    Raises:
        ValueError: for values out of range; all problems of one config in one message.
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
            "or messages=COLUMN; also system, input, tests. DATASET.prompt=COLUMN is for one dataset."
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
                setattr(self, name, [part.strip() for item in value for part in item.split(",") if part.strip()])
        if not self.datasets:
            problems.append("datasets is empty; give at least one dataset")
        if not isinstance(self.max_seq_length, int) or self.max_seq_length < MIN_SEQ_LENGTH:
            problems.append(f"max_seq_length is {self.max_seq_length!r}; it must be at least {MIN_SEQ_LENGTH} tokens")
        for name in ("training_subset", "eval_subset"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value <= 100:
                problems.append(f"{name} is {value!r}; it must be a percentage above 0 and at most 100")
        for name, allowed in (("overlong", (CUT, DROP)), ("loss_on", (RESPONSE, ALL))):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(map(repr, allowed))}")
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
            if not sign or not name or not _is_share(share):
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
        """`columns`, read."""
        choices = []
        for pair in self.columns:
            left, _, column = pair.partition("=")
            dataset, _, role = left.rpartition(".")
            choices.append(ColumnChoice(dataset or None, role, column))
        return choices

    @property
    def shares(self) -> dict[str, float]:
        """`mix`, read: share by dataset name; empty where it was not given."""
        return {name: float(share) for name, _, share in (pair.rpartition("=") for pair in self.mix)}


ROLES = ("system", "prompt", "input", "tests", "response", "messages", "text")
"""What a column of a dataset can be."""


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_router_layer(value: object) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return value >= 0
    if isinstance(value, float):
        return 0 < value < 1
    return value in (EMBEDDINGS, FINAL)


def parse_router_layer(text: str) -> str | int | float:
    """A `router_layer` as typed: a whole number is an index, a number with a point a fraction."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
