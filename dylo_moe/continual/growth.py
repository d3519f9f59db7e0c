"""What a growing pool knows of its skills: whether data is new, and the gate row of what is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.continual.config import GROW, NEAREST, SKIP, GrowthConfig
from dylo_moe.continual.gate_fit import fit_row, refit_rows
from dylo_moe.continual.novelty_detector import Novelty, judge
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.routing.router import Router

GROWN = "grown"

CONSOLIDATED = "consolidated"

SKIPPED = "skipped"

REPORTED = "reported"

Grow = Callable[..., None]
"""Adds an expert; `source`: a copy of that one, None: a fresh one."""

GateRows = dict[str, tuple[Tensor, Tensor]]
"""A gate row, fp32 [hidden], and its bias, fp32 scalar, of each expert."""


class SkillDecision(NamedTuple):
    """What `add_skill` made of some data, and why."""

    skill: str
    """Its name in the library; of data that is not new, the known skill's."""
    novel: bool
    score: float | None
    """How far the data lies from the nearest known skill; None where nothing is known."""
    threshold: float | None
    """What a score must exceed to be new; of a similarity, what it must fall below. None where nothing is known."""
    nearest: str | None
    """The known skill it is most like; None where nothing is known."""
    entropy: float
    """Mean entropy of the router's probabilities over the data's tokens, in nats; shown beside, it decides nothing."""
    action: str
    """"grown": a new expert is to learn it. "consolidated": the expert that knows it goes on learning. "skipped": it is
    known, and nothing is trained. "reported": it is new, but the pool is fixed, and nothing is trained."""
    expert: str | None
    """Who is to learn it; None: nobody."""


class Growth:
    """The library of a pool, and what follows from it. It reads the router's features and never a text.

    Args:
        config: when to grow, and how.
        router: whose gate rows are fitted.
        library: what is known already.
    """

    def __init__(self, config: GrowthConfig, *, router: Router, library: SkillLibrary) -> None:
        self.config = config
        self.library = library
        self._router = router

    def judge(self, texts: Sequence[Tensor]) -> Novelty:
        """How new a sample is.

        Args:
            texts: router features of each text, fp32 [tokens, hidden].
        """
        return judge(
            self.library,
            texts,
            method=self.config.novelty,
            false_alarm_rate=self.config.false_alarm_rate,
            similarity_threshold=self.config.similarity_threshold,
        )

    @torch.no_grad()
    def entropy(self, texts: Sequence[Tensor]) -> float:
        """Mean entropy of the gate's probabilities over the tokens of a sample, in nats."""
        p_TE = self._router.logits(torch.cat(list(texts))).softmax(-1)
        return float(torch.special.entr(p_TE).sum(-1).mean())

    @torch.no_grad()
    def shares(self, texts: Sequence[Tensor]) -> dict[str, float]:
        """Which members of the pool the tokens of a sample choose, as fractions."""
        chosen = self._router.logits(torch.cat(list(texts))).argmax(-1)
        counts = chosen.bincount(minlength=len(self._router.names)).double()
        return dict(zip(self._router.names, (counts / counts.sum()).tolist(), strict=True))

    def take(
        self, name: str, texts: Sequence[Tensor], *, expert: str | None, grow: Grow | None, seed: int
    ) -> SkillDecision:
        """Decide what to do with a sample; where somebody is to learn it, the library takes it up.

        Args:
            name: of the skill, and of its expert where one grows.
            texts: as for `judge`.
            expert: who is to learn it, whatever it is.
            grow: adds the expert; None: the pool is fixed.
            seed: of the draws.
        """
        novelty, entropy = self.judge(texts), self.entropy(texts)
        action, skill, learner = self._action(name, novelty, expert, can_grow=grow is not None)
        if action == GROWN and grow is not None:
            nearest = novelty.nearest if self.config.start_from == NEAREST else None
            grow(source=None if nearest is None else self.library[nearest].expert)
        if learner is not None:
            self.library.learn(skill, texts, expert=learner, seed=seed)
        if action == GROWN:
            self.fit(name, seed=seed)
        if learner is not None:
            self.library.note_shares(skill, self.shares(texts))
        score, threshold = (None, None) if novelty.nearest is None else (novelty.score, novelty.threshold)
        return SkillDecision(skill, novelty.novel, score, threshold, novelty.nearest, entropy, action, learner)

    def _action(
        self, name: str, novelty: Novelty, expert: str | None, *, can_grow: bool
    ) -> tuple[str, str, str | None]:
        """What is done with data, under which skill's name, and who learns it."""
        nearest, known = novelty.nearest, self.config.known_skill
        if expert is not None:
            return CONSOLIDATED, name if novelty.novel or nearest is None else nearest, expert
        if novelty.novel or nearest is None or known == GROW:
            return (GROWN, name, name) if can_grow else (REPORTED, name, None)
        if known == SKIP:
            return SKIPPED, nearest, None
        return CONSOLIDATED, nearest, self.library[nearest].expert

    def fit(self, expert: str, *, seed: int) -> None:
        """Fit one gate row against the library; all others stay bit for bit."""
        self._router.set_row(expert, *fit_row(self._router, self.library, expert, seed=seed))

    def refit(self, *, seed: int) -> GateRows:
        """All gate rows as the library would have them now; nothing is set."""
        return refit_rows(self._router, self.library, seed=seed)

    def forget(self, expert: str) -> list[str]:
        """Drop the skills of an expert that goes; returns their names."""
        gone = [name for name in self.library.skills if self.library[name].expert == expert]
        for name in gone:
            self.library.forget(name)
        return gone
