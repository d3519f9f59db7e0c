"""pass@k: the chance that at least one of k samples passes, estimated from n samples of each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dylo_moe.evaluation.intervals import Interval, bootstrap_interval, wilson_interval
from dylo_moe.utils.words import counted


class PassRate(NamedTuple):
    """An estimate of pass@k over some tasks."""

    k: int
    rate: float
    """The mean of pass@k over the tasks, from 0 to 1."""
    interval: Interval
    """The 95 % interval of that mean, if the tasks were drawn again."""
    num_tasks: int


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The unbiased estimate of pass@k for one task: 1 - C(n - c, k) / C(n, k), of n samples c of which passed.

    Chen et al. 2021 (arXiv:2107.03374), equation 1. It is the share of all k-subsets of the samples that hold one which
    passed; the plug-in 1 - (1 - c / n)^k is too low. As a product, prod_{i = n-c+1..n} (1 - k / i) is the ratio, so no
    binomial coefficient grows beyond a float.

    Raises:
        ValueError: if k is not from 1 to n, or c not from 0 to n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}; with {counted(num_samples, 'sample')} of a task it must be 1 to {num_samples}")
    if not 0 <= num_passed <= num_samples:
        raise ValueError(
            f"num_passed is {num_passed}; of {counted(num_samples, 'sample')} it must be 0 to {num_samples}"
        )
    if num_samples - num_passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_passed + 1, num_samples + 1))


def pass_rate(counts: Sequence[tuple[int, int]], k: int, *, seed: int) -> PassRate:
    """The mean of pass@k over tasks, with an interval.

    With one sample of each task the mean is a proportion, and the interval is Wilson's. Otherwise it is a bootstrap
    over the tasks, unless pass@k is 0 for every task or 1 for every task: then all resamples are equal, a bootstrap
    interval would have no width, and Wilson's is used as well.

    Args:
        counts: (number of samples, number of those that passed) for each task.
        seed: the seed of the bootstrap.

    Raises:
        ValueError: if there are no tasks, and as `pass_at_k` does.
    """
    if not counts:
        raise ValueError("counts is empty; pass@k needs at least one task")
    values = [pass_at_k(num_samples, num_passed, k) for num_samples, num_passed in counts]
    if all(value in (0.0, 1.0) for value in values) and (len(set(values)) == 1 or {n for n, _ in counts} == {1}):
        interval = wilson_interval(round(sum(values)), len(values))
    else:
        interval = bootstrap_interval(values, seed=seed)
    return PassRate(k, math.fsum(values) / len(values), interval, len(values))
