"""Find where a run of texts passes from one kind to another, so that no skill is learned from two kinds at once.

Shapes: N texts, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dylo_moe.continual.novelty_detector import level
from dylo_moe.continual.skill_library import SkillLibrary

MIN_TEXTS = 16
"""The fewest texts on each side of a change: fewer say too little about how much texts of their own kind differ."""

WINDOW = 100
"""By how many texts a window begins later than the one before, and half of its length."""

NEAR = 64
"""The most texts on each side of a change that the detector compares: those further away may be of a third kind."""

_PART = "part"


def change_points(means: Tensor, *, false_alarm_rate: float = 0.01) -> list[int]:
    """The positions at which another kind of text begins.

    Windows overlap by half, so that every change lies well inside one. Of a window the split with the least scatter
    inside its parts is tried (binary segmentation; Scott and Knott 1974), and it counts if the novelty detector would
    call the texts on each side of it new to somebody who knows the other side. Both parts are then looked at in the
    same way.

    Args:
        means: fp32 [texts, hidden], the mean of each text's router features, in the order of the texts.
        false_alarm_rate: of the detector.

    Returns:
        Positions in rising order, none of them 0 or the number of texts.
    """
    found: list[int] = []
    if len(means) < 2 * MIN_TEXTS:
        return found
    probe = SkillLibrary(means.shape[1])
    probe.learn("metric", list(means[:WINDOW, None]), expert="metric")
    for start in range(0, len(means), WINDOW):
        begin = max([start, *found])
        found += [begin + split for split in _changes(means[begin : start + 2 * WINDOW], probe, false_alarm_rate)]
    return found


def _changes(means_ND: Tensor, probe: SkillLibrary, rate: float) -> list[int]:
    """The changes inside one window, in rising order."""
    if len(means_ND) < 2 * MIN_TEXTS:
        return []
    split = _best_split(means_ND)
    parts = means_ND[:split], means_ND[split:]
    near = parts[0][-NEAR:], parts[1][:NEAR]
    if not all(_is_new(one, other, probe, rate) for one, other in (near, near[::-1])):
        return []
    before, after = (_changes(part, probe, rate) for part in parts)
    return [*before, split, *(split + position for position in after)]


def _best_split(means_ND: Tensor) -> int:
    """The split of which the parts' means lie farthest apart, weighted as the scatter between them is."""
    count = len(means_ND)
    sums_ND = means_ND.double().cumsum(0)
    sizes = torch.arange(MIN_TEXTS, count - MIN_TEXTS + 1)
    first_ND = sums_ND[sizes - 1]
    second_ND = sums_ND[-1] - first_ND
    weight = sizes * (count - sizes) / count
    between = weight * (first_ND / sizes[:, None] - second_ND / (count - sizes)[:, None]).square().sum(1)
    return int(sizes[between.argmax()])


def _is_new(known_ND: Tensor, part_ND: Tensor, probe: SkillLibrary, rate: float) -> bool:
    """Whether the detector calls one part new where only the other is known."""
    probe.learn(_PART, list(known_ND[:, None]), expert=_PART)
    distance = probe.distances(list(part_ND[:, None]))[_PART]
    limit = level(probe[_PART].scores, len(part_ND), rate)
    probe.forget(_PART)
    return distance > limit
