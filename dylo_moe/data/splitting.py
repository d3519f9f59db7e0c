"""Which rows are duplicates, which are held out, which are used: decided by hashes, the same on every machine.

All of it works on whole columns, so that millions of rows take seconds. Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dylo_moe.data.tokenizing import hash64

HELD_OUT_SHARE = 0.1
"""Share of a dataset's rows that is held out where it has no validation split, in whole documents."""


def order_keys(values: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """[N] hashes -> [N] places in a random order that follows from the seed (splitmix64)."""
    z = values.astype(np.uint64) ^ np.int64(hash64(str(seed).encode())).astype(np.uint64)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def find_duplicates(
    digests: Sequence[NDArray[np.int64]], first: Sequence[NDArray[np.bool_]]
) -> list[NDArray[np.int16]]:
    """For each row of each dataset, the place of the dataset that had it before; -1 where it is the first.

    Args:
        digests: [N] of each dataset.
        first: bool [N] of each; such rows count as earlier than all others, because they are held out.
    """
    everything = np.concatenate(digests)
    owner = np.repeat(np.arange(len(digests), dtype=np.int16), [len(part) for part in digests])
    order = np.argsort(~np.concatenate(first), kind="stable")
    _, earliest, inverse = np.unique(everything[order], return_index=True, return_inverse=True)
    original = order[earliest[inverse]]  # of each row in `order`: the earliest that is the same
    found = np.empty(len(everything), np.int16)
    found[order] = np.where(original == order, -1, owner[original])
    return np.split(found, np.cumsum([len(part) for part in digests])[:-1])


def hold_out(documents: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """[N] documents -> which rows are held out: whole documents, in the order of their keys, as long as they fit.

    Raises:
        ValueError: for fewer than two documents.
    """
    unique, inverse, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    if len(unique) < 2:
        raise ValueError(f"there are {len(unique)} document(s); two at least are needed to hold one out")
    room = max(1, round(HELD_OUT_SHARE * len(documents)))
    order = np.argsort(order_keys(unique, seed))
    chosen = np.zeros(len(unique), bool)
    for place in order:
        if sizes[place] <= room:
            chosen[place] = True
            room -= sizes[place]
        if room == 0:
            break
    if not chosen.any():
        chosen[order[np.argmin(sizes[order])]] = True
    return chosen[inverse]


def subset(digests: NDArray[np.int64], percent: float, seed: int) -> NDArray[np.int64]:
    """Places of that percentage of [N] rows, one at least; a smaller one lies inside a larger one."""
    count = max(1, round(len(digests) * percent / 100))
    return np.sort(np.argsort(order_keys(digests, seed), kind="stable")[:count])
