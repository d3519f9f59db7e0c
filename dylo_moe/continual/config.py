"""When a pool grows, and how: the options of continual learning."""

from __future__ import annotations

from dataclasses import dataclass, field

from dylo_moe.utils.checks import choice_problems, is_number

MAHALANOBIS = "mahalanobis"

COSINE = "cosine"

CONSOLIDATE = "consolidate"

SKIP = "skip"

GROW = "grow"

LIBRARY = "library"

FROZEN = "frozen"

FRESH = "fresh"

NEAREST = "nearest"

GROWN, CONSOLIDATED, SKIPPED, REPORTED = "grown", "consolidated", "skipped", "reported"
"""The actions of a `SkillDecision`. They are here, so that a reader of a stream's folder need not import PyTorch."""


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """When a pool grows, and how. The fields are flags of `dylora stream`.

    Raises:
        ValueError: for values out of range; one message holds all problems of a config.
    """

    novelty: str = field(
        default=MAHALANOBIS,
        metadata={
            "help": "How the distance of data from known skills is measured: mahalanobis, calibrated to a rate of "
            "false alarms, or cosine on centred features.",
            "choices": [MAHALANOBIS, COSINE],
        },
    )
    """How the distance of data from known skills is measured: "mahalanobis", or "cosine" on centred features."""

    false_alarm_rate: float = field(
        default=0.01,
        metadata={"help": "Share of samples of known skills that are taken for new ones (mahalanobis)."},
    )
    """Share of samples of known skills that are taken for new ones; mahalanobis is calibrated to it."""

    similarity_threshold: float = field(
        default=0.75, metadata={"help": "Data less similar than this to every known skill is new (cosine)."}
    )
    """The similarity to every known skill below which data is new, if `novelty` is "cosine"."""

    known_skill: str = field(
        default=CONSOLIDATE,
        metadata={
            "help": "What data of a known skill does: consolidate its expert at the low rate, skip, or grow a new "
            "expert.",
            "choices": [CONSOLIDATE, SKIP, GROW],
        },
    )
    """What data of a known skill trains: the skill's expert at a low rate ("consolidate"), nothing ("skip"), or a new
    expert ("grow")."""

    start_from: str = field(
        default=NEAREST,
        metadata={
            "help": "A new expert begins with zero delta (fresh) or as a copy of the nearest skill's expert (nearest).",
            "choices": [FRESH, NEAREST],
        },
    )
    """How a new expert begins: with zero delta ("fresh"), or as a copy of the nearest skill's expert ("nearest")."""

    gate_rows: str = field(
        default=LIBRARY,
        metadata={
            "help": "After each growth the gate rows of all experts are computed anew from the skill library "
            "(library), or the new expert's row is fitted and the others stay as they are for ever (frozen).",
            "choices": [LIBRARY, FROZEN],
        },
    )
    """What becomes of the gate after each growth. "library": the rows of all experts are computed anew, in closed form,
    from what the library keeps. "frozen": the new expert's row is fitted against the others, which stay bit for bit;
    skills that differ in kind then lose their tokens, because a row has the covariance of its day."""

    max_lost_share: float = field(
        default=0.05,
        metadata={"help": "A growth that costs a known skill more than this share of its tokens warns."},
    )
    """The share of a known skill's tokens, as estimated from the library, that a growth may take from its expert
    without a warning."""

    def __post_init__(self) -> None:
        problems = choice_problems(self)
        rate, similarity = self.false_alarm_rate, self.similarity_threshold
        if not is_number(rate) or not 0 < rate < 1:
            problems.append(f"false_alarm_rate is {rate!r}; it must be a number above 0 and below 1")
        if not is_number(similarity) or not -1 < similarity < 1:
            problems.append(f"similarity_threshold is {similarity!r}; it must be a number above -1 and below 1")
        if not is_number(self.max_lost_share) or not 0 <= self.max_lost_share <= 1:
            problems.append(f"max_lost_share is {self.max_lost_share!r}; it must be a number from 0 to 1")
        if problems:
            raise ValueError("GrowthConfig: " + "; ".join(problems))
