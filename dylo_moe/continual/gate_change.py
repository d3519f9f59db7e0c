"""Estimate from the skill library alone where the tokens of known skills are routed, and what another gate changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.routing.router import Router

NUM_DRAWS = 1000
"""The number of imagined tokens of each skill."""


class GateChange(NamedTuple):
    """What another gate means for one skill."""

    changed: float
    """The share of its tokens that go to another member of the pool than before."""
    before: float
    """The share that went to the skill's own expert."""
    after: float
    """The share that goes there now."""

    @property
    def lost(self) -> float:
        """The share by which its own expert has fewer of its tokens; 0 where it has more."""
        return max(self.before - self.after, 0.0)


class GateProbe:
    """Imagined tokens of every skill of a library, by which gates are compared.

    A token of a skill is drawn from the normal distribution with the skill's mean and the pooled covariance, and the
    noise of the draws is the same for all skills: it is multiplied with the gate once, whatever their number.

    Args:
        library: with at least one skill.
        seed: of the draws.
    """

    def __init__(self, library: SkillLibrary, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise_ND = torch.randn(NUM_DRAWS, library.hidden_size, generator=generator, dtype=torch.float64)
        self._noise_ND = noise_ND @ library.root.T
        self._means = {name: library[name].mean.double() for name in library.skills}
        self._owners = {name: library[name].expert for name in library.skills}

    @torch.no_grad()
    def choices(self, router: Router, *, without: str | None = None) -> dict[str, list[str]]:
        """The member of the pool that each imagined token of each skill is routed to first, by skill.

        Args:
            without: a member that is not there yet.
        """
        names = [name for name in router.names if name != without]
        scale_D = router.feature_scale.cpu().double()
        rows_ED = torch.stack([router.gate[name].detach().cpu().double() for name in names]) * scale_D
        bias_E = torch.stack([router.gate_bias[name].detach().cpu().double() for name in names])
        bias_E = bias_E - rows_ED @ router.feature_mean.cpu().double()
        noise_NE = self._noise_ND @ rows_ED.T
        found = {}
        for skill, mean_D in self._means.items():
            chosen_N: Tensor = (noise_NE + (rows_ED @ mean_D + bias_E)).argmax(1)
            found[skill] = [names[index] for index in chosen_N.tolist()]
        return found

    def changes(self, before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, GateChange]:
        """Compare the choices of two gates, for the skills that both know."""
        changes = {}
        for skill, was in before.items():
            if skill in after:
                owner, now = self._owners[skill], after[skill]
                changed = sum(one != other for one, other in zip(was, now, strict=True))
                shares = (choices.count(owner) / NUM_DRAWS for choices in (was, now))
                changes[skill] = GateChange(changed / NUM_DRAWS, *shares)
        return changes
