"""How sure a mean is: intervals from the units that it was measured on, be they tasks, rows or documents.

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
"""The ends of a 95 % interval then vary by about 2 % of its width from one seed to another."""

MAX_CELLS = 2**22
"""Drawn units held at once."""


class Interval(NamedTuple):
    """What a mean lies between, at some level; NaN at both ends where one unit is all there is, which tells nothing."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval has a sign; never of NaN."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> list[float] | None:
        """[low, high]; None where they are not known."""
        return [self.low, self.high] if math.isfinite(self.low) and math.isfinite(self.high) else None


def wilson_interval(num_passed: int, num_tasks: int, level: float = 0.95) -> Interval:
    """The score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953); it stays within 0 and 1, and
    is no point where all or none passed.

    Args:
        num_passed: of `num_tasks`, each of which passed or did not.
        level: between 0 and 1.

    Raises:
        ValueError: without tasks, for more passed than there are, or a level out of range.
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
    """The interval of the mean sum(w v) / sum(w) over units, from resampling them with replacement.

    For a paired difference give the differences of the units as `values`.

    Args:
        values: [N] finite numbers, one for each unit.
        weights: [N], above 0: how much of the mean each unit is, as its number of tokens; None: all alike.
        seed: of the draws.
        level: between 0 and 1.
        strata: [N] labels: as many units are drawn of each label as it has; None: all units are alike.

    Raises:
        ValueError: without units, for arrays of different lengths, or values, weights or a level out of range.
    """
    means = resampled_means(values, weights, seed=seed, strata=strata)
    return percentile_interval(means, sizes=stratum_sizes(np.size(values), strata), level=level)


def stratum_sizes(num_units: int, strata: ArrayLike | None) -> list[int]:
    """Units of each stratum."""
    return [num_units] if strata is None else np.unique(np.asarray(strata), return_counts=True)[1].tolist()


def resampled_means(
    values: ArrayLike, weights: ArrayLike | None = None, *, seed: int, strata: ArrayLike | None = None
) -> NDArray[np.float64]:
    """[R] means of as many resamples; arguments as of `bootstrap_interval`."""
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
    """The interval of a mean from [R] means of its resamples.

    Percentiles further out than the level's own: resamples of few units vary less than samples do, by a factor that
    Student's t and sqrt(n / (n - 1)) undo (Hesterberg 2015, doi:10.1080/00031305.2015.1089789, the expanded
    percentile interval; of several strata, their units and degrees of freedom together).

    Args:
        sizes: units of each stratum that was resampled; one unit tells nothing, and the interval is NaN.
        level: between 0 and 1.
    """
    _check_level(level)
    if min(sizes) < 2:
        return Interval(math.nan, math.nan)
    freedom = sum(sizes) - len(sizes)
    tail = NormalDist().cdf(-math.sqrt(sum(sizes) / freedom) * student_quantile(level, freedom))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def student_quantile(level: float, freedom: int) -> float:
    """What Student's t with that many degrees of freedom exceeds, on either side together, with chance 1 - level."""
    if freedom > 1000:  # equal to a thousandth
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
        raise ValueError("values hold NaN or infinity, of which no mean can be told; look at the units they come from")
    if not (np.isfinite(weights_N).all() and (weights_N > 0).all()):
        raise ValueError("weights must be finite and above 0; leave out units without any weight")
    return values_N, weights_N, strata_N
