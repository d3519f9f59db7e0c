"""Decide which rows are duplicates, which are held out and which are used, by hashes, so that every machine decides
alike.

All functions work on whole columns, so that millions of rows take seconds. Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dylo_moe.data.tokenizing import hash64
from dylo_moe.utils.words import counted

HELD_OUT_SHARE = 0.1
"""Share of a dataset's rows that is held out where it has no validation split, in whole documents."""


def order_keys(values: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Map [N] hashes to [N] keys; sorting by them gives a random order that depends on the seed alone (splitmix64)."""
    z = values.astype(np.uint64) ^ np.int64(hash64(str(seed).encode())).astype(np.uint64)
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def find_duplicates(
    digests: Sequence[NDArray[np.int64]], first: Sequence[NDArray[np.bool_]]
) -> list[NDArray[np.int16]]:
    """For each row of each dataset, find the index of the dataset that has the same row earlier; -1 if none has.

    Args:
        digests: hashes [N] of each dataset's rows.
        first: bool [N] for each dataset; the marked rows count as earlier than all others, because they are held out.
    """
    everything = np.concatenate(digests)
    owner = np.repeat(np.arange(len(digests), dtype=np.int16), [len(part) for part in digests])
    order = np.argsort(~np.concatenate(first), kind="stable")
    _, earliest, inverse = np.unique(everything[order], return_index=True, return_inverse=True)
    original = order[earliest[inverse]]  # for each row in `order`, the earliest one that is equal to it
    found = np.empty(len(everything), np.int16)
    found[order] = np.where(original == order, -1, owner[original])
    return np.split(found, np.cumsum([len(part) for part in digests])[:-1])


def hold_out(documents: NDArray[np.int64], seed: int, share: float = HELD_OUT_SHARE) -> NDArray[np.bool_]:
    """Choose about a share of [N] rows to hold out: whole documents, in a random order, as long as they fit.

    Args:
        documents: [N] hashes of the document that each row belongs to.
        seed: decides the random order.

    Returns:
        bool [N], whether each row is held out.

    Raises:
        ValueError: for fewer than two documents.
    """
    unique, inverse, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    if len(unique) < 2:
        raise ValueError(f"of {counted(len(unique), 'document')} none can be held out; give at least two")
    room = max(1, round(share * len(documents)))
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
    """Choose that percentage of [N] rows, at least one; a smaller percentage chooses a part of a larger one's rows."""
    count = max(1, round(len(digests) * percent / 100))
    return np.sort(np.argsort(order_keys(digests, seed), kind="stable")[:count])
