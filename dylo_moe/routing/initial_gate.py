"""Find kinds of text by k-means, from which a gate starts before anything is learned."""

from __future__ import annotations

import torch
from torch import Tensor

START_MARGIN = 2.0
"""Mean distance, in logits, between the first and the second expert of a text as `initialize` leaves it."""

RESTARTS = 8

ITERATIONS = 25


def kmeans(points: Tensor, num_clusters: int, *, seed: int) -> Tensor:
    """The centres of the best of several runs of k-means, each from a k-means++ start.

    Lloyd 1982; Arthur and Vassilvitskii 2007 (k-means++). Deterministic for one seed.

    Args:
        points: fp32 [points, dimensions], at least `num_clusters` of them.
        num_clusters: the number of centres.
        seed: the seed of the starts.

    Returns:
        fp32 [num_clusters, dimensions].
    """
    if len(points) < num_clusters:
        raise ValueError(f"{num_clusters} clusters need at least as many points; there are {len(points)}")
    generator = torch.Generator().manual_seed(seed)
    runs = [_run(points.cpu(), num_clusters, generator) for _ in range(RESTARTS)]
    return min(runs, key=lambda run: run[0])[1].to(points.device)


def _run(points: Tensor, num_clusters: int, generator: torch.Generator) -> tuple[float, Tensor]:
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < num_clusters:
        distances = torch.cdist(points, centres).amin(1) ** 2
        chosen = torch.multinomial(distances.clamp_min(1e-12), 1, generator=generator)
        centres = torch.cat([centres, points[chosen]])
    for _ in range(ITERATIONS):
        distances = torch.cdist(points, centres)
        nearest = distances.argmin(1)
        for index in range(num_clusters):
            members = points[nearest == index]
            # An empty cluster starts again at the point that is worst served.
            centres[index] = members.mean(0) if len(members) else points[distances.amin(1).argmax()]
    return float((torch.cdist(points, centres).amin(1) ** 2).sum()), centres
