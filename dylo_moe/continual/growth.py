"""Let a model grow: decide whether data is new and which expert learns it, and fit the gate row that routes to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dylo_moe.continual.base_texts import as_prompts, write_texts
from dylo_moe.continual.calibration import held_out_nats, place_temperatures
from dylo_moe.continual.config import (
    CONSOLIDATED,
    GROW,
    GROWN,
    LIBRARY,
    NEAREST,
    REPORTED,
    SKIP,
    SKIPPED,
    GrowthConfig,
)
from dylo_moe.continual.confusable import Confusable, confusable_skills
from dylo_moe.continual.gate_change import GateChange, GateProbe
from dylo_moe.continual.gate_fit import fit_row, refit_rows
from dylo_moe.continual.novelty_detector import Novelty, judge
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.experts.expert import check_name
from dylo_moe.routing.config import BASE
from dylo_moe.routing.features import RouterState, joined
from dylo_moe.utils.words import counted, listed

GateRows = dict[str, tuple[Tensor, Tensor]]
"""A gate row, fp32 [hidden], and its bias, fp32 scalar, of each expert."""


class SkillDecision(NamedTuple):
    """The decision of `add_skill` on some data, and the reasons for it."""

    skill: str
    """The name of the skill in the library; for data that is not new, that of the known skill."""
    novel: bool
    score: float | None
    """The distance of the data from the nearest known skill; None where nothing is known."""
    threshold: float | None
    """The value that a score must exceed, or a similarity fall below, to be new; None if nothing is known."""
    nearest: str | None
    """The known skill that the data is most like; None if nothing is known."""
    entropy: float
    """Mean entropy of the router's probabilities over the data's tokens, in nats; shown beside, it decides nothing."""
    action: str
    """"grown": a new expert is to learn it. "consolidated": the expert that knows it keeps learning. "skipped": it is
    known, and nothing is trained. "reported": it is new, but the pool is fixed, and nothing is trained."""
    expert: str | None
    """The expert that is to learn it; None: none."""
    changed: dict[str, float] | None = None
    """Of each skill that was known before, the share of its tokens that the new gate sends elsewhere than the old one;
    estimated from the library. None where nothing is learned."""
    lost: dict[str, float] | None = None
    """Of each of them, the share by which its own expert has fewer of its tokens; None where nothing is learned."""

    def lost_too_much(self, config: GrowthConfig) -> list[str]:
        """The known skills of whose tokens the growth has cost more than `GrowthConfig.max_lost_share`."""
        return [skill for skill, share in (self.lost or {}).items() if share > config.max_lost_share]

    def in_words(self, data: str) -> str:
        """Say whether data is new or known, why, and what follows from that.

        Args:
            data: the name of the data.
        """
        why = "nothing is known yet"
        if self.nearest is not None and self.score is not None and self.threshold is not None:
            is_distance = self.novel == (self.score > self.threshold)  # else a similarity, of which new data has less
            what, bound = ("distance from", "most") if is_distance else ("similarity to", "least")
            why = (
                f"its {what} the nearest known skill, {self.nearest}, is {self.score:.4g}, and {self.threshold:.4g} is "
                f"the {bound} that data of that skill would have"
            )
        follows = {
            GROWN: f"A new expert, {self.expert}, learns it.",
            CONSOLIDATED: f"The expert {self.expert} learns on from it, at the low rate.",
            SKIPPED: "It is skipped: nothing is trained.",
            REPORTED: "The pool is fixed, so nothing is trained.",
        }[self.action]
        text = f"{data} is {'new' if self.novel else 'known'}: {why}. {follows}"
        if self.changed:
            most = max(self.changed, key=self.changed.__getitem__)
            text += (
                f" Of the tokens of known skills at most {self.changed[most]:.1%} ({most}) change their expert, as "
                "estimated from the skill library."
            )
        return text


class Growth:
    """The skill library of a model, and the decisions based on it: what is new, which expert learns it, its gate row.

    It reads the router's features and never keeps a text.

    Args:
        model: a `DyLoRAMoE`; of it the router, the pool, `text_states`, `add_expert` and `route_to` are used.
        config: when to grow, and how; default `GrowthConfig()`.
        library: what is known already; default nothing.
        enabled: whether new data may add experts.
    """

    def __init__(
        self,
        model: Any,
        *,
        config: GrowthConfig | None = None,
        library: SkillLibrary | None = None,
        enabled: bool = False,
    ) -> None:
        self.config = GrowthConfig() if config is None else config
        self.library = SkillLibrary(model.router.hidden_size) if library is None else library
        self.enabled = enabled
        self._model = model

    def enable(self, config: GrowthConfig | None, *, seed: int) -> None:
        """Let `add_skill` grow the pool; gate rows are fitted from then on, and `base` is a member of the pool.

        Of a pool that was trained jointly the experts and their gate rows stay as they are.

        Args:
            config: default: as it was, or `GrowthConfig()`.
            seed: of the draws that the base's own gate row is fitted with, where experts are there already.

        Raises:
            ValueError: for a pool of experts whose skills are not known, to which all text would be new; tell it of
                them with `know_skill` first. Nothing has changed then.
        """
        router, pool = self._model.router, self._model.experts
        if len(pool) and not self.library.skills:
            raise ValueError(
                "this pool's skills are not known, so that all text would be new to it; know_skill() first"
            )
        self.config = self.config if config is None else config
        if not router.has_base:
            router.add_base()
            if len(pool):
                self._write_base(seed)
                router.set_row(BASE, *fit_row(router, self.library, BASE, seed=seed))
        self.enabled = True

    def fix(self, config: GrowthConfig | None) -> None:
        """Fix the pool: `add_skill` then adds no expert and reports what is new. The library stays.

        Args:
            config: how to judge; default: as it was, or `GrowthConfig()`.
        """
        self.config = self.config if config is None else config
        self.enabled = False

    # Judgement.

    def judge(self, texts: Sequence[Tensor]) -> Novelty:
        """Judge how new a sample is.

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
    def entropy(self, texts: Sequence[RouterState]) -> float:
        """Mean entropy of the gate's probabilities over the tokens of a sample, in nats.

        Args:
            texts: total [tokens, hidden] and mass [tokens, 1] of each.
        """
        p_TE = self._model.router.posterior_logits(joined(texts)).softmax(-1)
        return float(torch.special.entr(p_TE).sum(-1).mean())

    @torch.no_grad()
    def shares(self, texts: Sequence[RouterState]) -> dict[str, float]:
        """Which members of the pool the tokens of a sample choose by the gate of now, as fractions.

        Args:
            texts: total [tokens, hidden] and mass [tokens, 1] of each.
        """
        router = self._model.router
        chosen = router.posterior_logits(joined([router.reread(text) for text in texts])).argmax(-1)
        counts = chosen.bincount(minlength=len(router.names)).double()
        return dict(zip(router.names, (counts / counts.sum()).tolist(), strict=True))

    # What is learned.

    def add_skill(
        self, name: str, batches: Iterable[dict[str, Tensor]], *, rank: int | None, expert: str | None, seed: int
    ) -> SkillDecision:
        """Decide whether data is new, and which expert is to learn it; where it is new, add that expert.

        The library stores the data's statistics and the new gate row is fitted at once, because they follow from the
        frozen base alone. Training is left to the caller.

        Args:
            name: of the skill and, where it is new, of its expert.
            batches: a sample of it, as for `DyLoRAMoE.text_features`; 100 texts are plenty.
            rank: of a new expert; default the pool's.
            expert: an expert of the pool that is to learn this data whatever it is. The gate sends it there only
                after its row was fitted again.
            seed: of the draws and of the new expert's start.

        Raises:
            ValueError: for a name that cannot be an expert's, an unknown expert, or fewer than two texts; nothing has
                changed then.
        """
        if expert is not None:
            self._model.experts[expert]  # raises for an unknown name
        states = self._states(name, batches)
        texts = [text.mean for text in states]
        if self.enabled:
            self._write_base(seed)
        novelty, entropy = self.judge(texts), self.entropy(states)
        action, skill, learner = self._action(name, novelty, expert)
        if action == GROWN:
            nearest = novelty.nearest if self.config.start_from == NEAREST else None
            source = None if nearest is None else self.library[nearest].expert
            self._add_expert(name, source=source, rank=rank, seed=seed)
        score, threshold = (None, None) if novelty.nearest is None else (novelty.score, novelty.threshold)
        decision = SkillDecision(skill, novelty.novel, score, threshold, novelty.nearest, entropy, action, learner)
        if learner is None:
            return decision
        known = self.library.skills
        self._learn(skill, states, expert=learner, seed=seed)
        changes = self.fit(learner, known=known, is_new=action == GROWN, seed=seed)
        self.library.note_shares(skill, self.shares(states))
        return decision._replace(
            changed={name: change.changed for name, change in changes.items()},
            lost={name: change.lost for name, change in changes.items()},
        )

    def _action(self, name: str, novelty: Novelty, expert: str | None) -> tuple[str, str, str | None]:
        """Decide what is done with data, under which skill's name, and which expert learns it."""
        nearest, known = novelty.nearest, self.config.known_skill
        if expert is not None:
            is_its_own = nearest is not None and not novelty.novel and self.library[nearest].expert == expert
            return CONSOLIDATED, cast(str, nearest) if is_its_own else name, expert
        if novelty.novel or nearest is None or known == GROW:
            return (GROWN, name, name) if self.enabled else (REPORTED, name, None)
        if known == SKIP:
            return SKIPPED, nearest, None
        return CONSOLIDATED, nearest, self.library[nearest].expert

    @torch.no_grad()
    def _add_expert(self, name: str, *, source: str | None, rank: int | None, seed: int) -> None:
        """Add an expert to the pool: a copy of `source`, or one with zero delta. Random state stays as it was."""
        pool = self._model.experts
        check_name(name, taken=pool, modules=pool.base_modules())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._model.add_expert(name, rank=rank, skill=name)
        if source is not None:
            pool.copy(source, name)

    def know_base(self, batches: Iterable[dict[str, Tensor]], *, seed: int) -> None:
        """Store the statistics of general text, which should stay with the unchanged base; no gate row changes.

        Gate rows that are fitted from here on are fitted against it, and no longer against what was told before. Where
        nothing was told when the first one is fitted, texts that the base itself writes stand in.

        Args:
            batches: as for `add_skill`.
            seed: of the batches that are scored for calibration.
        """
        turns = self._model.router_config.turns
        if turns is not None:
            batches = (as_prompts(batch, turns) for batch in batches)
        texts = [text.mean for text in self._states(BASE, batches)]
        if BASE in self.library:
            self.library.forget(BASE)
        self.library.learn(BASE, texts, expert=BASE, seed=seed)

    def _write_base(self, seed: int) -> None:
        """Let texts that the base writes stand for general text, unless the library has some."""
        if BASE not in self.library:
            with self._model.route_to(None):
                self.know_base([{"input_ids": write_texts(self._model, seed=seed)}], seed=seed)

    def know_skill(self, name: str, batches: Iterable[dict[str, Tensor]], *, seed: int) -> str:
        """Store the statistics of a skill that the pool has already; no expert and no gate row changes.

        Args:
            name: of the skill.
            batches: a sample of it, as for `add_skill`.
            seed: of the batches that are scored for calibration.

        Returns:
            The expert that most of its tokens choose, whose skill it counts as.
        """
        states = self._states(name, batches)
        shares = self.shares(states)
        expert = max(shares.keys() - {BASE}, key=shares.__getitem__)
        self._learn(name, states, expert=expert, seed=seed)
        self.library.note_shares(name, shares)
        return expert

    def _learn(self, skill: str, states: Sequence[RouterState], *, expert: str, seed: int) -> None:
        """Let the library learn texts of a skill, and how sure a gate may be of their tokens at each place."""
        self.library.learn(skill, [text.mean for text in states], expert=expert, seed=seed)
        router = self._model.router_config
        nats = held_out_nats(
            self.library, skill, states, half_life=router.router_half_life, change_rate=router.change_rate
        )
        self.library.note_calibration(skill, nats)

    def _states(self, skill: str, batches: Iterable[dict[str, Tensor]]) -> list[RouterState]:
        texts = self._model.text_states(batches)
        if len(texts) < 2:
            raise ValueError(
                f"skill {skill!r} was given {counted(len(texts), 'text')}; give at least two, better a hundred"
            )
        return texts

    # Gate rows.

    @property
    def rows_follow_library(self) -> bool:
        """Whether all gate rows are computed from the library: as the config says, in a pool that grows or grew, and if
        the library knows a skill of every expert. Else the rows of a jointly trained pool stay as they were trained."""
        return self.config.gate_rows == LIBRARY and self._model.router.has_base and not self.unknown_experts

    @property
    def unknown_experts(self) -> list[str]:
        """The experts of which the library knows no skill."""
        owners = {self.library[name].expert for name in self.library.skills}
        return [name for name in self._model.experts.names if name not in owners]

    def fit(self, expert: str, *, known: Sequence[str] = (), is_new: bool = False, seed: int) -> dict[str, GateChange]:
        """Let the gate follow what the library has learned of an expert: all rows anew, or only that expert's.

        Args:
            known: the skills for which the change is estimated.
            is_new: the expert has just come, so that its row is no part of the gate before.
            seed: of the draws.

        Returns:
            What changes for each of the known skills.
        """
        router = self._model.router
        probe = GateProbe(self.library, seed=seed)
        before = probe.choices(router, without=expert if is_new else None)
        if self.rows_follow_library:
            self.set_rows(self.refit())
        else:
            router.set_row(expert, *fit_row(router, self.library, expert, seed=seed))
        changes = probe.changes(before, probe.choices(router))
        return {skill: changes[skill] for skill in known}

    def set_rows(self, rows: GateRows) -> None:
        """Set gate rows, and the temperatures that follow from the library."""
        for name, (row, bias) in rows.items():
            self._model.router.set_row(name, row, bias)
        self._model.router.set_place_temperatures(place_temperatures(self.library))

    def confusable(self, *, of: str | None = None) -> list[Confusable]:
        """The skills of different experts that the detector takes for each other; see `confusable_skills`."""
        return confusable_skills(self.library, self.config, of=of)

    def merge_weights(self, experts: Sequence[str]) -> list[float]:
        """The share of each of these experts in the tokens that the library has seen of their skills; they sum to 1.

        Raises:
            ValueError: for an expert that has no skill in the library.
        """
        skills = [self.library[name] for name in self.library.skills]
        counts = [sum(skill.num_tokens for skill in skills if skill.expert == expert) for expert in experts]
        unknown = [expert for expert, count in zip(experts, counts, strict=True) if not count]
        if unknown:
            raise ValueError(
                f"the library has no skill of {listed(unknown)}, so that nothing says what a merged expert is routed "
                "to; know_skill() first"
            )
        return [count / sum(counts) for count in counts]

    def merge(self, experts: Sequence[str], expert: str, *, seed: int) -> None:
        """Let one expert know the skills of others, in whose place it has come, and let the gate follow."""
        self.library.reassign(experts, expert)
        self.fit(expert, seed=seed)

    def refit(self) -> GateRows:
        """All gate rows as the library would have them now; nothing is set."""
        return refit_rows(self._model.router, self.library)

    def forget(self, expert: str) -> list[str]:
        """Drop the skills of a removed expert; returns their names."""
        gone = [name for name in self.library.skills if self.library[name].expert == expert]
        for name in gone:
            self.library.forget(name)
        if self._model.router.place_temperatures is not None:
            self._model.router.set_place_temperatures(place_temperatures(self.library))
        return gone
