"""How many rows each dataset gives to an epoch, and in which order they come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dylo_moe.data.splitting import order_keys


class Share(NamedTuple):
    """The part of an epoch that comes from one dataset."""

    name: str
    rows: int
    share: float
    """The dataset's share of the epoch's rows."""
    tokens: int
    """The number of tokens that are trained."""
    token_share: float
    passes: float
    """How often each of the dataset's rows is seen in an epoch."""


def epoch_rows(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The number of rows each dataset gives to an epoch that has the given shares and holds every row at least once.

    The dataset that is largest for its share decides the length of the epoch; the rows of smaller ones repeat.
    """
    tiny = 1e-9  # 0.1 + 0.2 is not 0.3
    total = max(math.ceil(size / share - tiny) for size, share in zip(sizes, shares, strict=True))
    exact = [total * share for share in shares]
    counts = [math.floor(value + tiny) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts


def pass_over(rows: NDArray[np.int64], digests: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Choose `count` rows: whole passes over all rows as long as they fit, each in another random order.

    Args:
        rows: [N] indices of rows.
        digests: [N] hashes of the same rows, which decide the order.
    """
    passes = [rows[np.argsort(order_keys(digests, seed + turn))] for turn in range(math.ceil(count / len(rows)))]
    return np.concatenate(passes)[:count]


def interleave(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Merge all parts into one order in which each part is spread evenly."""
    places = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
    return np.concatenate(parts)[np.argsort(places, kind="stable")]


def measure_shares(
    names: Sequence[str], sizes: Sequence[int], rows: Sequence[int], tokens: Sequence[int]
) -> list[Share]:
    """The shares that datasets have in an epoch, in rows and in tokens.

    Args:
        sizes: the number of rows that each dataset has.
        rows: the number of rows that each gives to the epoch.
        tokens: the number of trained tokens that each gives to the epoch.
    """
    return [
        Share(name, count, count / sum(rows), trained, trained / max(sum(tokens), 1), count / size)
        for name, size, count, trained in zip(names, sizes, rows, tokens, strict=True)
    ]
