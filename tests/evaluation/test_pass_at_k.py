"""pass@k against values by hand, against counting subsets, and against exact fractions."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dylo_moe.evaluation.intervals import wilson_interval
from dylo_moe.evaluation.pass_at_k import pass_at_k, pass_rate


@pytest.mark.parametrize(
    ("num_samples", "num_passed", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (5, 2, 1, 2 / 5),
        (5, 2, 2, 1 - 3 / 10),  # 3 of the 10 pairs hold none of the two
        (5, 2, 3, 1 - 1 / 10),
        (5, 2, 4, 1.0),  # three fail, so any four hold one that passed
        (10, 3, 5, 1 - 21 / 252),
        (200, 1, 100, 0.5),
        (200, 0, 100, 0.0),
    ],
)
def test_by_hand(num_samples, num_passed, k, expected):
    assert pass_at_k(num_samples, num_passed, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_it_is_the_share_of_the_subsets_that_hold_one_which_passed(num_samples):
    for num_passed, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        subsets = list(itertools.combinations([place < num_passed for place in range(num_samples)], k))
        share = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(num_samples, num_passed, k) == pytest.approx(share, abs=1e-12)


@given(st.data())
def test_it_equals_the_fraction_of_binomials_where_those_are_beyond_a_float(data):
    num_samples = data.draw(st.integers(1, 3000))
    num_passed, k = data.draw(st.integers(0, num_samples)), data.draw(st.integers(1, num_samples))
    exact = 1 - Fraction(math.comb(num_samples - num_passed, k), math.comb(num_samples, k))
    assert pass_at_k(num_samples, num_passed, k) == pytest.approx(float(exact), abs=1e-10)


def test_it_is_unbiased_which_the_plug_in_is_not():
    """The mean over all outcomes of n samples, each of which passes with probability p, is 1 - (1 - p)^k."""
    num_samples, k, p = 6, 3, 0.3
    weights = [math.comb(num_samples, c) * p**c * (1 - p) ** (num_samples - c) for c in range(num_samples + 1)]
    mean = sum(weight * pass_at_k(num_samples, c, k) for c, weight in enumerate(weights))
    plug_in = sum(weight * (1 - (1 - c / num_samples) ** k) for c, weight in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert plug_in < mean - 0.01


@pytest.mark.parametrize(
    ("values", "name"), [((5, 2, 0), "k"), ((5, 2, 6), "k"), ((5, 6, 1), "num_passed"), ((5, -1, 1), "num_passed")]
)
def test_what_cannot_be_is_refused(values, name):
    with pytest.raises(ValueError, match=f"^{name} is "):
        pass_at_k(*values)


def test_tasks_count_alike_however_many_samples_they_have():
    rate = pass_rate([(2, 1), (4, 1), (10, 10)], 2, seed=0)
    assert rate.rate == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    assert (rate.k, rate.num_tasks) == (2, 3)
    assert rate.interval.low < rate.rate < rate.interval.high
    assert rate == pass_rate([(2, 1), (4, 1), (10, 10)], 2, seed=0)


def test_one_sample_a_task_has_the_interval_of_a_proportion():
    """A bootstrap of tasks that all failed would say that the rate is certainly 0."""
    rate = pass_rate([(1, 0)] * 20, 1, seed=0)
    assert rate.rate == 0 and rate.interval == wilson_interval(0, 20)
    assert rate.interval.high == pytest.approx(0.1611, abs=1e-3)


def test_several_samples_of_which_none_or_all_passed_have_an_interval_that_is_no_point():
    assert pass_rate([(10, 0)] * 20, 5, seed=0).interval == wilson_interval(0, 20)
    assert pass_rate([(10, 7)] * 20, 5, seed=0).interval == wilson_interval(20, 20)
    mixed = pass_rate([(10, 0)] * 10 + [(10, 7)] * 10, 5, seed=0)
    assert mixed.rate == 0.5 and mixed.interval != wilson_interval(10, 20)


def test_no_task_has_no_rate():
    with pytest.raises(ValueError, match="counts is empty"):
        pass_rate([], 1, seed=0)
