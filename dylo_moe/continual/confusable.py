"""Which skills of different experts the novelty detector takes for each other, judged from the library alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from dylo_moe.continual.config import COSINE, GrowthConfig
from dylo_moe.continual.novelty_detector import level
from dylo_moe.continual.skill_library import BATCH_SIZES, Skill, SkillLibrary


class Confusable(NamedTuple):
    """Two skills of different experts, each of which would not have been new if only the other had been known."""

    first: str
    """The skill that was learned first."""
    second: str
    experts: tuple[str, str]
    """The expert of each."""
    distance: float
    """Between the two, whitened and squared as in `SkillLibrary.distances`; by "cosine" their similarity."""
    level: float
    """The distance below which neither is new to the other; by "cosine" the similarity above which it is not."""
    num_texts: int | None
    """The size of the batches for which the level holds; None by "cosine"."""

    def in_words(self) -> str:
        """Say which two skills they are, how near, and of which experts."""
        if self.num_texts is None:
            near = f"similarity {self.distance:.4g}, threshold {self.level:.4g}"
        else:
            near = f"distance {self.distance:.4g}, level {self.level:.4g} for {self.num_texts} texts at a time"
        return (
            f"The detector cannot tell {self.first} from {self.second} ({near}), of the experts "
            f"{self.experts[0]} and {self.experts[1]}."
        )


def confusable_skills(library: SkillLibrary, config: GrowthConfig, *, of: str | None = None) -> list[Confusable]:
    """The pairs of skills that the novelty detector takes for each other; skills of one expert are no such pair.

    By "mahalanobis": the whitened squared distance between the two means is at most what batches of either skill's own
    texts exceed with probability `false_alarm_rate`, at the largest size of a batch that both were calibrated for. So
    text of the one, were only the other known, would be called known, and the other way round. By "cosine": the means,
    centred on that of all skills, are at least as similar as `similarity_threshold`.

    Nothing is said of a skill whose sample was too small for batches of two texts: how far a single text is from its
    skill says nothing about how far skills are from each other.

    Args:
        config: how the detector judges.
        of: only pairs with this skill; default all.

    Returns:
        The pairs, nearest first.
    """
    names = library.skills
    found = []
    for first, second, nearness in _nearness(library, config):
        one, other = library[names[first]], library[names[second]]
        if one.expert == other.expert or of not in (None, one.name, other.name):
            continue
        num_texts = None if config.novelty == COSINE else _common_size(one, other)
        if num_texts == 1:
            continue
        if num_texts is None:
            limit = config.similarity_threshold
            is_near = nearness >= limit
        else:
            limit = min(level(skill.scores, num_texts, config.false_alarm_rate) for skill in (one, other))
            is_near = nearness <= limit
        if is_near:
            experts = (one.expert, other.expert)
            found.append(Confusable(one.name, other.name, experts, nearness, limit, num_texts))
    return sorted(found, key=lambda pair: -pair.distance if pair.num_texts is None else pair.distance)


def _nearness(library: SkillLibrary, config: GrowthConfig) -> list[tuple[int, int, float]]:
    """The distance, or by "cosine" the similarity, of all pairs of skills, as (place, later place, value)."""
    if len(library.skills) < 2:
        return []
    means_SD = torch.stack([library[name].mean.double() for name in library.skills])
    if config.novelty == COSINE:
        centred_SD = means_SD - means_SD.mean(0)
        values_SS = F.cosine_similarity(centred_SD[:, None], centred_SD[None], dim=-1)
    else:
        values_SS = torch.cdist(library.whitened(means_SD), library.whitened(means_SD)).square()
    places = torch.triu_indices(len(means_SD), len(means_SD), offset=1).T.tolist()
    return [(first, second, float(values_SS[first, second])) for first, second in places]


def _common_size(one: Skill, other: Skill) -> int:
    """The largest size of a batch that both skills were calibrated for; a single text always is."""
    usable_S = ~(one.scores.isnan().any(1) | other.scores.isnan().any(1))
    return max(size for size, is_usable in zip(BATCH_SIZES, usable_S.tolist(), strict=True) if is_usable)
