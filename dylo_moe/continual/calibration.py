"""Measure how sure a gate may be of a token, by the number of tokens that its features stand on.

A gate of linear discriminants believes that features of a skill scatter around its mean as one normal distribution.
Real texts differ more from each other than that, and a mean of two tokens scatters far more than one of two hundred. So
the logits of each place of a text are divided by a temperature (Guo et al. 2017, arXiv:1706.04599), the one at which
texts that the gate was not made of had the least loss.

Shapes: D hidden, E members, T tokens, P places, G temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dylo_moe.continual.skill_library import Skill, SkillLibrary, scatter_around
from dylo_moe.routing.belief import evidence_of, filtered
from dylo_moe.routing.features import NUM_PLACES, RouterState, places_of

TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-16, 33))
"""The temperatures that are tried: from 1/16 to 256, four for each doubling."""

FOLDS = 4
"""Each quarter of a sample is judged by a gate that was made of the other three; a sample of fewer texts is not."""

LEAST_VARIANCE = 0.01
"""The least share of the pooled variance that must be left without a fold, for a gate to be made of the rest."""


def held_out_nats(
    library: SkillLibrary, skill: str, texts: Sequence[RouterState], *, half_life: float, change_rate: float = 0.0
) -> Tensor:
    """The loss of choosing the right member of the pool for texts of a skill, at each place and temperature.

    Each fold of the texts is taken out of the skill's mean and out of the covariance first. A comparison of many
    members says more than one of two, so that the loss and the count are multiplied by the number of other members.

    Args:
        library: which has learned these texts.
        texts: the router's memory after each token of each text; texts of one document stand together.
        half_life: of the router's mean, in tokens.
        change_rate: of the router's filter; 0: it has none.

    Returns:
        fp64 [places, temperatures + 1]: nats, summed over the tokens, and in the last column their number; zeros for
        a sample of fewer than `FOLDS` texts.
    """
    nats_PG = torch.zeros(NUM_PLACES, len(TEMPERATURES) + 1, dtype=torch.float64)
    members = sorted({library[name].expert for name in library.names} - {library[skill].expert})
    if not members or len(texts) < FOLDS:
        return nats_PG
    own, (scatter_DD, count) = library[skill], library.pooled
    texts = [text.each(lambda part: part.detach().cpu()) for text in texts]
    for indices in torch.arange(len(texts)).tensor_split(FOLDS):
        fold = [texts[index] for index in indices]
        means_TD = torch.cat([text.mean for text in fold])
        place_T = torch.cat([places_of(text.mass[:, 0], half_life=half_life) for text in fold])
        rest_D, rest_DD = _without(own, means_TD, scatter_DD)
        if rest_DD.trace() / (count - len(means_TD)) < LEAST_VARIANCE * scatter_DD.trace() / count:
            continue  # the other texts are all alike, and their covariance is rounding
        row_ED, bias_E = library.discriminants(
            [own.expert, *members],
            covariance=(rest_DD, count - len(means_TD)),
            means={skill: rest_D},
        )
        if change_rate:
            of_texts = [text.tokens(half_life).double() @ row_ED.T + bias_E for text in fold]
            beliefs = [filtered(evidence_of(of_text)[None], change_rate=change_rate)[0] for of_text in of_texts]
            logits_TE = torch.cat(beliefs)
        else:
            logits_TE = means_TD.double() @ row_ED.T + bias_E
        for column, temperature in enumerate(TEMPERATURES):
            loss_T = F.cross_entropy(logits_TE / temperature, place_T.new_zeros(len(place_T)), reduction="none")
            nats_PG[:, column].index_add_(0, place_T, loss_T)
        nats_PG[:, -1] += place_T.bincount(minlength=NUM_PLACES)
    return nats_PG * len(members)


def _without(skill: Skill, tokens_TD: Tensor, scatter_DD: Tensor) -> tuple[Tensor, Tensor]:
    """The skill's mean and the pooled scatter, as they would be without some of the skill's tokens."""
    whole_D, num_tokens, num_taken = skill.mean.double(), skill.num_tokens, len(tokens_TD)
    taken_D = tokens_TD.double().mean(0)
    rest_D = (whole_D * num_tokens - taken_D * num_taken) / (num_tokens - num_taken)
    weight = num_taken * (num_tokens - num_taken) / num_tokens
    shift_D = taken_D - rest_D
    return rest_D, scatter_DD - scatter_around(tokens_TD, taken_D) - weight * torch.outer(shift_D, shift_D)


def place_temperatures(library: SkillLibrary) -> Tensor:
    """The temperature of each place, fp32 [places]: the one with the least loss over the texts of all skills.

    A place that no text reached takes its neighbour's.
    """
    total_PG = torch.zeros(NUM_PLACES, len(TEMPERATURES) + 1, dtype=torch.float64)
    for name in sorted(library.skills):
        if library[name].calibration.shape == total_PG.shape:  # else measured by an older version, or not at all
            total_PG += library[name].calibration
    best_P = torch.tensor(TEMPERATURES)[total_PG[:, :-1].argmin(1)]
    known = [place for place in range(NUM_PLACES) if total_PG[place, -1] > 0]
    if not known:
        return torch.ones(NUM_PLACES)
    nearest = [min(known, key=lambda other: (abs(other - place), other)) for place in range(NUM_PLACES)]
    return best_P[nearest]
