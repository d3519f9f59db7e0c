"""Where a run of texts passes from one kind to another."""

import pytest
import torch

from dylo_moe.continual.change_points import MIN_TEXTS, WINDOW, change_points

SIZE = 24


def texts(kinds, seed=0):
    """The means of texts, so many of each kind: kinds lie 2 apart, and texts of one kind scatter by 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2.0 * torch.nn.functional.normalize(torch.randn(9, SIZE, generator=generator), dim=1)
    parts = [centres[kind] + torch.randn(count, SIZE, generator=generator) / SIZE**0.5 for kind, count in kinds]
    return torch.cat(parts)


@pytest.mark.parametrize(
    "counts",
    [
        [60, 70],
        [WINDOW, WINDOW],
        [WINDOW - 1, 70, 40],
        [2 * WINDOW + 3, MIN_TEXTS, 2 * WINDOW],
        [MIN_TEXTS, 90, 130, 40, 75],
    ],
)
def test_changes_are_found_where_they_are(counts):
    for seed in range(2):
        found = change_points(texts(list(enumerate(counts)), seed))
        expected = torch.tensor(counts).cumsum(0)[:-1].tolist()
        assert len(found) == len(expected), (seed, found, expected)
        assert all(abs(one - other) <= 1 for one, other in zip(found, expected, strict=True)), (seed, found, expected)


def test_texts_of_one_kind_and_texts_in_no_order_are_not_cut():
    """A cut is a false alarm in at most one of a hundred windows, as the detector is set."""
    found = [change_points(texts([(0, 4 * WINDOW)], seed)) for seed in range(5)]
    mixed = [texts([(0, 150), (1, 150)], seed) for seed in range(5)]
    found += [change_points(part[torch.randperm(300, generator=torch.Generator().manual_seed(1))]) for part in mixed]
    assert sum(map(len, found)) <= 1


def test_a_kind_that_comes_again_begins_again():
    assert change_points(texts([(0, 70), (1, 70), (0, 70)])) == [70, 140]


@pytest.mark.parametrize("count", [0, 1, 2 * MIN_TEXTS - 1])
def test_too_few_texts_are_left_whole(count):
    assert change_points(texts([(0, MIN_TEXTS), (1, MIN_TEXTS)])[:count]) == []
