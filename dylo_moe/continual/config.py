"""When a pool grows, and how: the options of continual learning."""

from __future__ import annotations

from dataclasses import dataclass

from dylo_moe.utils.checks import is_number

MAHALANOBIS = "mahalanobis"

COSINE = "cosine"

CONSOLIDATE = "consolidate"

SKIP = "skip"

GROW = "grow"

FRESH = "fresh"

NEAREST = "nearest"


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
        if not is_number(rate) or not 0 < rate < 1:
            problems.append(f"false_alarm_rate is {rate!r}; it must be a number above 0 and below 1")
        if not is_number(similarity) or not -1 < similarity < 1:
            problems.append(f"similarity_threshold is {similarity!r}; it must be a number above -1 and below 1")
        if problems:
            raise ValueError("GrowthConfig: " + "; ".join(problems))
