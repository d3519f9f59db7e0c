"""Judge whether data is of a kind that the library knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dylo_moe.continual.skill_library import BATCH_SIZES, SkillLibrary

LOWEST_LEVEL = 0.7
"""The lowest level, as a share of the calibrated one, for batches larger than those it was calibrated on. The
documents of new data differ from those of the sample, and larger batches do not average this difference out."""

METHODS = ("mahalanobis", "cosine")


class Novelty(NamedTuple):
    """The judgement of `judge` on a batch of texts."""

    novel: bool
    score: float
    """The distance from the nearest skill (`SkillLibrary.distances`), or with "cosine" the similarity with it. 0 where
    no skill is known."""
    threshold: float
    """The value that the score of new data exceeds or, by "cosine", falls below; 0 if no skill is known."""
    nearest: str | None
    """The skill that the batch is most like; None if none is known."""


def judge(
    library: SkillLibrary,
    texts: Sequence[Tensor],
    *,
    method: str = "mahalanobis",
    false_alarm_rate: float = 0.01,
    similarity_threshold: float = 0.75,
) -> Novelty:
    """Judge whether a batch of texts is new, that is of no known skill; without known skills every batch is.

    "mahalanobis": the distance of the batch from the nearest skill (`SkillLibrary.distances`; after Lee et al. 2018,
    arXiv:1807.03888, who score single samples), against the level that held-out batches of that skill exceed with
    probability `false_alarm_rate`.
    "cosine": the similarity of the batch's mean with the nearest skill's, both centred on the mean of all skills; with
    one skill known there is nothing to centre on, and everything is new.

    Args:
        library: what is known.
        texts: router features of each text, fp32 [tokens, hidden]; any number but none.
        method: "mahalanobis" or "cosine".
        false_alarm_rate: of "mahalanobis", for a batch of known text.
        similarity_threshold: of "cosine", below which data is new.

    Raises:
        ValueError: for no text, an unknown method, or a rate outside (0, 1).
    """
    if not len(texts):
        raise ValueError("novelty needs at least one text; got none")
    if method not in METHODS:
        raise ValueError(f"novelty method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must be between 0 and 1; it is {false_alarm_rate}")
    if not library.skills:
        return Novelty(True, 0.0, 0.0, None)
    if method == "cosine":
        return _judge_cosine(library, texts, similarity_threshold)
    distances = library.distances(texts)
    nearest = min(distances, key=distances.__getitem__)
    limit = level(library[nearest].scores, len(texts), false_alarm_rate)
    return Novelty(distances[nearest] > limit, distances[nearest], limit, nearest)


def level(scores: Tensor, num_texts: int, rate: float) -> float:
    """The score that a batch of known text exceeds with a small probability.

    It is the level of the largest calibrated size that is not larger than the batch. For a larger batch it is less, as
    a mean's spread falls with the square root of its size, but at least `LOWEST_LEVEL` times as much.

    Args:
        scores: fp32 [sizes, scores], see `Skill.scores`.
        num_texts: the number of texts of the batch.
        rate: the probability.
    """
    usable = [
        (size, row)
        for size, row in zip(BATCH_SIZES, scores, strict=True)
        if size <= num_texts and not row.isnan().any()
    ]
    size, row = usable[-1]
    shrinks = (
        1.0 if size == 1 else max((size / num_texts) ** 0.5, LOWEST_LEVEL)
    )  # the score of one text is another statistic
    return float(row.double().quantile(1 - rate)) * shrinks


def _judge_cosine(library: SkillLibrary, texts: Sequence[Tensor], similarity_threshold: float) -> Novelty:
    names = library.skills
    means_ED = torch.stack([library[name].mean for name in names])
    centre_D = means_ED.mean(0)
    batch_D = torch.stack([text.detach().cpu().float().mean(0) for text in texts]).mean(0)
    similarities = F.cosine_similarity((batch_D - centre_D)[None], means_ED - centre_D)
    best = int(similarities.argmax())
    score = float(similarities[best])
    return Novelty(score < similarity_threshold, score, similarity_threshold, names[best])
