"""The options of the experts: how many there are, whether one is shared, and what LoRA adapter each one is."""

from __future__ import annotations

from dataclasses import dataclass, field

from dylo_moe.utils.checks import COUNT, COUNT_OR_NONE, SHARE_BELOW_ONE, range_problems

ALL_LINEAR = "all-linear"

RANGES = {
    "num_experts": COUNT,
    "lora_r": COUNT,
    "lora_alpha": COUNT,
    "lora_dropout": SHARE_BELOW_ONE,
    "shared_r": COUNT_OR_NONE,
    "shared_alpha": COUNT,
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

    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha; an expert is scaled by alpha / rank."})
    """LoRA's alpha; an expert's delta is scaled by alpha / rank."""

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

    shared_alpha: int | None = field(
        default=None, metadata={"help": "Its LoRA alpha; default: as its rank asks for to be scaled as the others."}
    )
    """LoRA's alpha of the shared expert; None: such that alpha / rank is that of the others."""

    def __post_init__(self) -> None:
        problems = range_problems(vars(self), RANGES)
        if self.shared_alpha is not None and not self.shared_r:
            problems.append(f"shared_alpha is {self.shared_alpha!r}, but without --shared_r there is no shared expert")
        targets = self.lora_targets
        if isinstance(targets, str) or not all(isinstance(item, str) for item in targets):
            problems.append(f"lora_targets is {targets!r}; it must be a list of strings")
        else:
            self.lora_targets = [name for item in targets for name in item.split(",") if name]
            if not self.lora_targets:
                problems.append("lora_targets is empty; name at least one linear, or leave it out for all of them")
        if problems:
            raise ValueError("ExpertConfig: " + "; ".join(problems))
