"""Confidence intervals of a mean, from the units that it was measured on: tasks, rows or documents.

Shapes: N units, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 10_000
"""The number of resamples; with it the ends of a 95 % interval vary by 2 % of its width from one seed to another."""

MAX_CELLS = 2**22
"""The most drawn units that are held in memory at once."""


class Interval(NamedTuple):
    """A confidence interval of a mean; both ends are NaN if there is only one unit, from which nothing is known."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval is clearly above or below zero; False for NaN."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> list[float] | None:
        """The interval as [low, high]; None if its ends are not known."""
        return [self.low, self.high] if math.isfinite(self.low) and math.isfinite(self.high) else None


def wilson_interval(num_passed: int, num_tasks: int, level: float = 0.95) -> Interval:
    """The score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    It stays within 0 and 1, and has a width even if all or none passed.

    Args:
        num_passed: how many of the `num_tasks` tasks passed.
        level: the confidence level, between 0 and 1.

    Raises:
        ValueError: without tasks, if more passed than there are, or for a level out of range.
    """
    _check_level(level)
    if num_tasks < 1 or not 0 <= num_passed <= num_tasks:
        raise ValueError(
            f"num_passed is {num_passed} of num_tasks {num_tasks}; it must be 0 to num_tasks, of 1 or more"
        )
    z, share = _normal_quantile(level), num_passed / num_tasks
    scale = 1 + z**2 / num_tasks
    middle = (share + z**2 / (2 * num_tasks)) / scale
    half = z * math.sqrt(share * (1 - share) / num_tasks + z**2 / (4 * num_tasks**2)) / scale
    return Interval(0.0 if num_passed == 0 else middle - half, 1.0 if num_passed == num_tasks else middle + half)


def bootstrap_interval(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    seed: int,
    level: float = 0.95,
    strata: ArrayLike | None = None,
) -> Interval:
    """The bootstrap interval of the mean sum(w v) / sum(w), by resampling units with replacement.

    For a paired difference give the differences of the units as `values`.

    Args:
        values: [N] finite numbers, one for each unit.
        weights: [N] numbers above 0, the weight of each unit in the mean, such as its tokens; None: all are equal.
        seed: the seed of the draws.
        level: the confidence level, between 0 and 1.
        strata: [N] labels; each resample has as many units of a label as there are; None: one stratum.

    Raises:
        ValueError: without units, for arrays of different lengths, or for values, weights or a level out of range.
    """
    means = resampled_means(values, weights, seed=seed, strata=strata)
    return percentile_interval(means, sizes=stratum_sizes(np.size(values), strata), level=level)


def stratum_sizes(num_units: int, strata: ArrayLike | None) -> list[int]:
    """The number of units in each stratum."""
    return [num_units] if strata is None else np.unique(np.asarray(strata), return_counts=True)[1].tolist()


def resampled_means(
    values: ArrayLike, weights: ArrayLike | None = None, *, seed: int, strata: ArrayLike | None = None
) -> NDArray[np.float64]:
    """The means [R] of the resamples; the arguments are those of `bootstrap_interval`."""
    values_N, weights_N, strata_N = _checked(values, weights, strata)
    generator = np.random.default_rng(seed)
    sums_R, totals_R = np.zeros(NUM_RESAMPLES), np.zeros(NUM_RESAMPLES)
    for label in np.unique(strata_N):
        units = np.flatnonzero(strata_N == label)
        step = max(1, MAX_CELLS // len(units))
        for start in range(0, NUM_RESAMPLES, step):
            stop = min(start + step, NUM_RESAMPLES)
            drawn_RN = units[generator.integers(len(units), size=(stop - start, len(units)))]
            totals_R[start:stop] += weights_N[drawn_RN].sum(1)
            sums_R[start:stop] += (weights_N * values_N)[drawn_RN].sum(1)
    return sums_R / totals_R


def percentile_interval(means: NDArray[np.float64], *, sizes: Sequence[int], level: float = 0.95) -> Interval:
    """The expanded percentile interval of a mean, from the means [R] of its resamples.

    The percentiles are further out than those of the level: resamples of few units vary less than samples do, by a
    factor that Student's t and sqrt(n / (n - 1)) undo (Hesterberg 2015, doi:10.1080/00031305.2015.1089789). With
    several strata, the units and degrees of freedom of all are added.

    Args:
        sizes: the number of units of each resampled stratum; if one has a single unit, the interval is NaN.
        level: the confidence level, between 0 and 1.
    """
    _check_level(level)
    if min(sizes) < 2:
        return Interval(math.nan, math.nan)
    freedom = sum(sizes) - len(sizes)
    tail = NormalDist().cdf(-math.sqrt(sum(sizes) / freedom) * student_quantile(level, freedom))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def student_quantile(level: float, freedom: int) -> float:
    """The two-sided quantile of Student's t: |t| exceeds it with probability 1 - level."""
    if freedom > 1000:  # the normal quantile differs by less than a thousandth
        return _normal_quantile(level)
    # With t = sqrt(freedom) tan(a), the density of a is that of cos(a) ** (freedom - 1), which needs no far tail.
    angle = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(freedom) * math.tan(np.interp(level, below / below[-1], angle)))


def _normal_quantile(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be above 0 and below 1")


def _checked(values: ArrayLike, weights: ArrayLike | None, strata: ArrayLike | None) -> Sequence[NDArray[Any]]:
    values_N = np.asarray(values, np.float64)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, np.float64)
    strata_N = np.zeros(len(values_N), int) if strata is None else np.asarray(strata)
    if values_N.ndim != 1 or not len(values_N) or not len(values_N) == len(weights_N) == len(strata_N):
        raise ValueError(
            f"values, weights and strata have shapes {values_N.shape}, {weights_N.shape} and {strata_N.shape}; they "
            "must be of one length, of 1 unit or more"
        )
    if not np.isfinite(values_N).all():
        raise ValueError("values hold NaN or infinity, so they have no mean; look at the units they come from")
    if not (np.isfinite(weights_N).all() and (weights_N > 0).all()):
        raise ValueError("weights must be finite and above 0; leave out units without any weight")
    return values_N, weights_N, strata_N
