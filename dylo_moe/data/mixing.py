"""How much of an epoch each dataset is, and in which order the rows come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dylo_moe.data.splitting import order_keys


class Share(NamedTuple):
    """What one dataset is of an epoch."""

    name: str
    rows: int
    share: float
    """Of the epoch's rows."""
    tokens: int
    """Trained ones."""
    token_share: float
    passes: float
    """Times that each of its rows is seen in an epoch."""


def epoch_rows(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Rows that each dataset gives to an epoch in which it has a share and every row is seen at least once.

    The epoch is as long as the dataset that is largest for its share demands; smaller ones repeat.
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
    """`count` of some rows, whole passes first, each shuffled anew.

    Args:
        rows: [N] places.
        digests: [N] hashes of the same rows, which decide the order.
    """
    passes = [rows[np.argsort(order_keys(digests, seed + turn))] for turn in range(math.ceil(count / len(rows)))]
    return np.concatenate(passes)[:count]


def interleave(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """All parts, each spread evenly over the whole."""
    places = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
    return np.concatenate(parts)[np.argsort(places, kind="stable")]


def measure_shares(
    names: Sequence[str], sizes: Sequence[int], rows: Sequence[int], tokens: Sequence[int]
) -> list[Share]:
    """The effective shares.

    Args:
        sizes: rows that each dataset has.
        rows, tokens: that each gives to an epoch.
    """
    return [
        Share(name, count, count / sum(rows), trained, trained / max(sum(tokens), 1), count / size)
        for name, size, count, trained in zip(names, sizes, rows, tokens, strict=True)
    ]
