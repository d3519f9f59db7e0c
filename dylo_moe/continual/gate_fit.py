"""Fit the gate row of an expert from the library's statistics alone.

Shapes: D hidden, E the other rows, N draws. "Whitened": in coordinates where the library's covariance is the identity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.routing.config import BASE
from dylo_moe.routing.router import Router

NEARNESS = 5.0
"""How quickly the weight of a known row in a new one's start falls with the squared distance of its skill."""

NUM_DRAWS = 2048
"""The number of sampled tokens of the skill, of all other skills together, and of the base, each."""

PRIOR = 0.1
"""Weight of the squared distance of a fitted row from its start, whitened."""

ITERATIONS = 30


class _Other(NamedTuple):
    """A skill that a row is fitted against, whitened, in fp64."""

    mean: Tensor
    """The mean of its tokens, [D]."""
    row: Tensor
    """Its gate row, [D]."""
    bias: Tensor


def fit_row(router: Router, library: SkillLibrary, expert: str, *, seed: int) -> tuple[Tensor, Tensor]:
    """The gate row of one expert; the rows of all others are taken as they are, and stay.

    The start is closed: a row that was right for skill j becomes right for the new skill by adding the linear
    discriminant between the two, C^-1 (m - m_j) (Fisher 1936); the nearest skills count. Where all rows were made so
    with one C, that is the optimum. Rows that were made with an older covariance, or by joint training, are met by a
    few steps on the logistic loss over Gaussian draws, new row against the others' logsumexp, held near the start.

    Text that should go to the base is the library's entry `base`. Without one the router's feature mean stands for it,
    which is far from all real text unless `initialize` set it: then almost no token is sent to the base.

    Args:
        router: with a row for the expert, of any value.
        library: with at least one skill of the expert's; for `base`, with any skill.
        expert: whose row.
        seed: of the draws.

    Returns:
        row fp32 [hidden], bias fp32 scalar, on the CPU.

    Raises:
        ValueError: where the library has no skill of the expert.
    """
    root_DD = library.root
    origin_D = _background(router, library)
    means = _own_means(library, expert, root_DD, origin_D)
    others = [
        _Other(_whitened(library[name].mean.double() - origin_D, root_DD), *_row(router, owner, root_DD, origin_D))
        for name in library.skills
        if (owner := library[name].expert) != expert and owner in router.names
    ]
    zero_D = torch.zeros_like(origin_D)
    base = []
    if expert != BASE:
        known = _row(router, BASE, root_DD, origin_D) if router.has_base else (zero_D, zero_D.sum())
        base = [_Other(zero_D, *known)]
    start_D, bias = _start(torch.stack(means).mean(0), others or base)
    row_D, bias = _descend(start_D, bias, means, others, base, seed)
    return _to_router(router, row_D, bias, root_DD, origin_D)


def refit_rows(router: Router, library: SkillLibrary) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows of all experts that have skills, as linear discriminants against the base's row: a closed form.

    They are a function of the library: skills that were learned in another order give the same rows, bit for bit. An
    expert of several skills has the row of their mean. Where the base's own row is not zeros, as in a pool that was
    trained jointly, all rows stand that much higher.

    Returns:
        As `fit_row`, for each expert.

    Raises:
        ValueError: if the library knows no skill.
    """
    owners = {library[name].expert for name in library.skills}
    experts = [name for name in router.names if name in owners]
    if not experts:
        raise ValueError("the library has learned no skill yet, so there is no gate row to fit; learn() one first")
    rows_ED, bias_E = library.discriminants(experts, origin=_background(router, library))
    mean_D, scale_D = router.feature_mean.cpu().double(), router.feature_scale.cpu().double()
    gates_ED, gate_bias_E = rows_ED / scale_D, bias_E + rows_ED @ mean_D
    if router.has_base:
        gates_ED = gates_ED + router.gate[BASE].detach().cpu().double()
        gate_bias_E = gate_bias_E + router.gate_bias[BASE].detach().cpu().double()
    return {name: (gates_ED[index].float(), gate_bias_E[index].float()) for index, name in enumerate(experts)}


def _start(mean_D: Tensor, others: list[_Other]) -> tuple[Tensor, Tensor]:
    """The start of a row: the mean of the other rows, each moved to the new skill by the discriminant between the two.

    Rows of near skills weigh more.
    """
    if not others:
        return mean_D, -0.5 * mean_D @ mean_D
    means_ED = torch.stack([other.mean for other in others])
    differences_ED = mean_D - means_ED
    weights_E = (-differences_ED.square().sum(1) / NEARNESS).softmax(0)
    rows_ED = torch.stack([other.row for other in others]) + differences_ED
    biases_E = torch.stack([other.bias for other in others]) - 0.5 * (differences_ED * (mean_D + means_ED)).sum(1)
    return weights_E @ rows_ED, weights_E @ biases_E


def _descend(
    start_D: Tensor, start_bias: Tensor, means: list[Tensor], others: list[_Other], base: list[_Other], seed: int
) -> tuple[Tensor, Tensor]:
    """Minimise the logistic loss of the new row against the others' logsumexp, over whitened draws, with a penalty on
    leaving the start."""
    generator = torch.Generator().manual_seed(seed)
    groups = [_draw(means, generator)]
    groups += [_draw([other.mean for other in group], generator) for group in (others, base) if group]
    if len(groups) == 1:
        return start_D, start_bias
    x_ND = torch.cat(groups)
    sign_N = torch.cat([torch.full((len(group),), -1.0 if index else 1.0) for index, group in enumerate(groups)])
    weight_N = torch.cat([torch.full((len(group),), 1.0 / len(group)) for group in groups])
    rows_ED = torch.stack([other.row for other in (*base, *others)])
    biases_E = torch.stack([other.bias for other in (*base, *others)])
    known_N = (x_ND @ rows_ED.T + biases_E).logsumexp(1)
    row_D, bias = start_D.clone().requires_grad_(), start_bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([row_D, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        margin_N = sign_N * (x_ND @ row_D + bias - known_N)
        loss = (weight_N * F.softplus(-margin_N)).sum() + 0.5 * PRIOR * (row_D - start_D).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return row_D.detach(), bias.detach()


def _draw(means: list[Tensor], generator: torch.Generator) -> Tensor:
    """About `NUM_DRAWS` whitened draws, as many around each mean: fp64 [N, D]."""
    each = max(NUM_DRAWS // len(means), 1)
    noise = torch.randn(len(means), each, len(means[0]), generator=generator, dtype=torch.float64)
    return (torch.stack(means)[:, None] + noise).flatten(0, 1)


def _own_means(library: SkillLibrary, expert: str, root_DD: Tensor, origin_D: Tensor) -> list[Tensor]:
    if expert == BASE:
        return [torch.zeros_like(origin_D)]
    names = sorted(name for name in library.skills if library[name].expert == expert)
    if not names:
        raise ValueError(f"expert {expert!r} has no skill in the library to fit its gate row to; learn() one first")
    return [_whitened(library[name].mean.double() - origin_D, root_DD) for name in names]


def _background(router: Router, library: SkillLibrary) -> Tensor:
    return (library[BASE].mean if BASE in library else router.feature_mean.cpu()).double()


def _whitened(difference_D: Tensor, root_DD: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(root_DD, difference_D[:, None], upper=False)[:, 0]


def _row(router: Router, name: str, root_DD: Tensor, origin_D: Tensor) -> tuple[Tensor, Tensor]:
    """A gate row of the router, for whitened differences from the origin."""
    row_D = (router.gate[name].detach().double() * router.feature_scale.double()).cpu()
    bias = router.gate_bias[name].detach().double().cpu() + row_D @ (origin_D - router.feature_mean.cpu().double())
    return root_DD.T @ row_D, bias


def _to_router(router: Router, row_D: Tensor, bias: Tensor, root_DD: Tensor, origin_D: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_row`."""
    row_D = torch.linalg.solve_triangular(root_DD.T, row_D[:, None], upper=True)[:, 0]
    bias = bias - row_D @ (origin_D - router.feature_mean.cpu().double())
    return (row_D / router.feature_scale.cpu().double()).float(), bias.float()
