"""The options of the experts: how many there are, whether one is shared, and what LoRA adapter each one is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dylo_moe.utils.checks import COUNT, COUNT_OR_NONE, POSITIVE, SHARE_BELOW_ONE, range_problems

ALL_LINEAR = "all-linear"

RANGES = {
    "num_experts": COUNT,
    "lora_r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE_BELOW_ONE,
    "shared_r": COUNT_OR_NONE,
    "shared_alpha": POSITIVE,
}


@dataclass(kw_only=True)
class ExpertConfig:
    """The experts that are trained together: their number, and the LoRA adapter that each one is.

    Hu et al. 2021, arXiv:2106.09685, section 4.1. The fields are flags of the commands that train.

    Raises:
        ValueError: for values out of range; one message holds all problems of a config.
    """

    num_experts: int = field(default=4, metadata={"help": "Experts trained together."})
    """The number of experts trained together; a pool that grows begins with none instead."""

    lora_r: int = field(default=16, metadata={"help": "Rank of each expert."})
    """The rank of each expert."""

    lora_alpha: float = field(default=32, metadata={"help": "LoRA alpha; an expert is scaled by alpha / rank."})
    """LoRA's alpha; an expert's delta is scaled by alpha / rank. It may be a fraction; a whole number is an int."""

    use_rslora: bool = field(
        default=False,
        metadata={
            "help": "Scale an expert by alpha / sqrt(rank) (rsLoRA), so that one alpha suits small and large ranks."
        },
    )
    """Whether an expert's delta is scaled by alpha / sqrt(rank) instead, as PEFT's `LoraConfig.use_rslora` does
    (Kalajdzievski 2023, arXiv:2312.03732, eq. 4)."""

    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the experts' input."})
    """The probability that a feature of the experts' input is dropped in training."""

    lora_targets: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={"help": "Names of the linears that carry experts; all-linear: every one in the routed layers."},
    )
    """The names of the linears that carry experts; "all-linear" is every one in the routed layers. An item may hold
    several names separated by commas, as typed on the command line."""

    shared_r: int = field(default=0, metadata={"help": "Rank of one more expert that every token uses; 0: none."})
    """The rank of one more expert that every token uses, whatever it is routed to; 0: there is none."""

    shared_alpha: float | None = field(
        default=None, metadata={"help": "Its LoRA alpha; default: as its rank asks for to be scaled as the others."}
    )
    """LoRA's alpha of the shared expert; None: such that it is scaled as the others."""

    def __post_init__(self) -> None:
        problems = range_problems(vars(self), RANGES)
        if self.shared_alpha is not None and not self.shared_r:
            problems.append(f"shared_alpha is {self.shared_alpha!r}, but without --shared_r there is no shared expert")
        if not problems:
            self.lora_alpha = whole_if_it_is(self.lora_alpha)
            self.shared_alpha = None if self.shared_alpha is None else whole_if_it_is(self.shared_alpha)
        targets = self.lora_targets
        if isinstance(targets, str) or not all(isinstance(item, str) for item in targets):
            problems.append(f"lora_targets is {targets!r}; it must be a list of strings")
        else:
            self.lora_targets = [name for item in targets for name in item.split(",") if name]
            if not self.lora_targets:
                problems.append("lora_targets is empty; name at least one linear, or leave it out for all of them")
        if problems:
            raise ValueError("ExpertConfig: " + "; ".join(problems))

    @property
    def scale(self) -> float:
        """The factor s of an expert's delta s B A x."""
        return lora_scale(self.lora_alpha, self.lora_r, use_rslora=self.use_rslora)


def lora_scale(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """The factor s of a LoRA's delta s B A x, the same number as PEFT's."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def alpha_of_scale(scale: float, rank: int, *, use_rslora: bool) -> float:
    """The alpha with which a LoRA of this rank is scaled by `scale`; with `use_rslora` to within rounding."""
    return whole_if_it_is(scale * (math.sqrt(rank) if use_rslora else rank))


def whole_if_it_is(number: float) -> float:
    """An int where a number is whole, as servers and older readers of an adapter's config expect its alpha."""
    return int(number) if float(number).is_integer() else number
