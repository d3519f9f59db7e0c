"""How often the gate is right, and how sure it is, at each place of a text and after a change of subject.

    python benchmarks/continual/calibration.py [--half_lives 32 16] [--change_rates 0 0.01]
        [--skills python cpp javascript perl tcl]

The gate is the one that a stream computes from its skill library: linear discriminants with one covariance, and a
temperature for each place. It is made of 112 rows a skill and judged on 64 rows of other documents. The expected
calibration error is that of ten bins (Guo et al. 2017, arXiv:1706.04599). Nothing is trained, and the base does not
run: the features are those of its embeddings. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from skills import LANGUAGES, Skill, read_skill
from torch import Tensor

from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.continual.calibration import held_out_nats, place_temperatures
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.routing.belief import evidence_of, filtered
from dylo_moe.routing.config import RouterConfig
from dylo_moe.routing.features import NUM_PLACES, RouterState, causal_exponential_mean, places_of, read_tokens

SPANS = {"0-8": (0, 8), "8-32": (8, 32), "32-128": (32, 128), "128 on": (128, 256)}
SWITCH_AFTER, SETTLED, READ_ON = 768, 32, 160


class Judged(NamedTuple):
    """What a gate makes of some tokens of known skills."""

    logits: Tensor
    """fp64 [tokens, skills], divided by the temperatures."""
    skill: Tensor
    """int64 [tokens], the right one."""

    def right(self) -> Tensor:
        """Whether the likeliest skill is the right one."""
        return self.logits.argmax(-1) == self.skill

    def calibration_error(self) -> float:
        """The mean distance between how sure and how often right."""
        sure, right = self.logits.softmax(-1).amax(-1), self.right().double()
        bins = (sure * 10).long().clamp(max=9)
        parts = [(bins == one).nonzero()[:, 0] for one in range(10)]
        return sum(
            float((sure[part].mean() - right[part].mean()).abs()) * len(part) for part in parts if len(part)
        ) / len(sure)

    def row(self) -> str:
        """Cells of the table: share right, nats, calibration error."""
        nats = torch.nn.functional.cross_entropy(self.logits, self.skill)
        return f"{float(self.right().double().mean()):.3f} / {float(nats):.2f} / {self.calibration_error():.3f}"


class Gate:
    """A stream's gate of some skills, on the embeddings of a base.

    Args:
        embeddings: of the base's tokens, [vocabulary, hidden].
        skills: that are learned.
        half_life: of the router's mean, in tokens.
        change_rate: of the router's filter; 0: it has none.
    """

    def __init__(self, embeddings: Tensor, skills: Sequence[Skill], *, half_life: float, change_rate: float) -> None:
        self._embeddings = embeddings
        self._router = RouterConfig(router_half_life=half_life, change_rate=change_rate)
        self.library = SkillLibrary(embeddings.shape[1])
        for skill in skills:
            states = self.states(skill.train.input_ids)
            texts = [states.each(lambda part, row=row: part[row]) for row in range(len(states.mass))]
            self.library.learn(skill.name, list(states.mean), expert=skill.name)
            nats = held_out_nats(self.library, skill.name, texts, half_life=half_life, change_rate=change_rate)
            self.library.note_calibration(skill.name, nats)
        self.temperatures = place_temperatures(self.library)
        self._rows, self._bias = self.library.discriminants([skill.name for skill in skills])

    def states(self, ids: Tensor) -> RouterState:
        """What the router knows after each token, of rows of token ids."""
        mask = torch.ones_like(ids, dtype=torch.bool)
        return causal_exponential_mean(self._embeddings[ids], mask=mask, half_life=self._router.router_half_life)[1]

    def logits(self, ids: Tensor, temperatures: Tensor) -> Tensor:
        """fp64 [rows, tokens, skills]."""
        states, rate = self.states(ids), self._router.change_rate
        mask = torch.ones_like(ids, dtype=torch.bool)
        read = read_tokens(self._embeddings[ids], mask=mask) if rate else states.mean
        logits = read.double() @ self._rows.T + self._bias
        if rate:
            logits = filtered(evidence_of(logits), change_rate=rate)
        places = places_of(states.mass[..., 0], half_life=self._router.router_half_life)
        return logits / temperatures.double()[places][..., None]


def judged(gate: Gate, skills: Sequence[Skill], temperatures: Tensor, span: tuple[int, int]) -> Judged:
    """The held-out tokens of all skills at some places."""
    parts = [gate.logits(skill.held_out.input_ids, temperatures)[:, slice(*span)].flatten(0, 1) for skill in skills]
    return Judged(torch.cat(parts), torch.arange(len(skills)).repeat_interleave(len(parts[0])))


def after_switch(gate: Gate, skills: Sequence[Skill]) -> Judged:
    """Tokens 32 to 160 of held-out rows, each read after 768 tokens of another skill."""
    parts, right = [], []
    for before, after in itertools.permutations(range(len(skills)), 2):
        texts = skills[after].held_out.input_ids[::4, :READ_ON]
        heads = skills[before].held_out.input_ids.repeat(4, 1)[: 3 * len(texts)].view(len(texts), -1)
        logits = gate.logits(torch.cat([heads[:, -SWITCH_AFTER:], texts], 1), gate.temperatures)
        parts.append(logits[:, SWITCH_AFTER + SETTLED :].flatten(0, 1))
        right.append(torch.full((len(parts[-1]),), after))
    return Judged(torch.cat(parts), torch.cat(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--skills", nargs="+", default=list(LANGUAGES))
    parser.add_argument("--half_lives", type=float, nargs="+", default=[8.0])
    parser.add_argument("--change_rates", type=float, nargs="+", default=[0.01], help="of the filter; 0: none")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    skills = [read_skill(name, tokenizer, num_train=112, num_held_out=64) for name in arguments.skills]
    embeddings = load_base(arguments.model, dtype=torch.float32).get_input_embeddings().weight.detach()
    print("Each cell: share of tokens right / nats / expected calibration error.\n")
    heads = ["half-life", "change rate", "temperatures", *SPANS, "after a change"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for half_life, rate in itertools.product(arguments.half_lives, arguments.change_rates):
        gate = Gate(embeddings, skills, half_life=half_life, change_rate=rate)
        for name, temperatures in (("all 1", torch.ones(NUM_PLACES)), ("by place", gate.temperatures)):
            cells = [judged(gate, skills, temperatures, span).row() for span in SPANS.values()]
            switched = after_switch(gate, skills).row() if name == "by place" else ""
            print(f"| {half_life:g} | {rate:g} | {name} | {' | '.join(cells)} | {switched} |", flush=True)
        found = [round(float(value), 2) for value in gate.temperatures]
        print(f"temperatures of half-life {half_life:g}, change rate {rate:g}: {found}")


if __name__ == "__main__":
    main()
