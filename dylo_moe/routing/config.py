"""How tokens are sent to experts: the options of the router."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from dylo_moe.routing.turn_tokens import TurnTokens
from dylo_moe.utils.checks import choice_problems, is_number
from dylo_moe.utils.words import counted

EMBEDDINGS = "embeddings"

FINAL = "final"

TOKEN = "token"

SEQUENCE = "sequence"

RESPONSE = "response"

LEARNED = "learned"

UNIFORM = "uniform"

RANDOM = "random"

BASE = "base"
"""The member of a growing pool that stands for the unchanged base: a gate row, and no adapter."""

SHARED = "shared"
"""The expert that every token uses, beside those that it is routed to: an adapter, and no gate row."""

BALANCE_COEFFICIENT = 0.01

HALF_LIFE, FILTERED_HALF_LIFE, RESPONSE_HALF_LIFE = 32.0, 8.0, 16.0
"""Defaults of the half-life of the router's mean: without a filter, with one, and with granularity "response", where a
decision stands on the prompt that it ends, and not on the turns before."""

CHANGE_RATE = 0.01
"""Default of the filter's change rate."""

TOP_P_HELP = (
    "Where the gate is sure, fewer than top_k experts: the fewest whose probabilities reach this sum. 1: always top_k."
)

OF_LEARNING = ("z_loss_coefficient", "entropy_coefficient", "temperature")

OF_CHOOSING = ("top_k", "top_p", "granularity", "router_half_life", "change_rate")
"""The fields of `RouterConfig` that shape how a gate learns, and those that decide how a token's experts are chosen."""


def parse_router_layer(text: str) -> str | int | float:
    """Parse a `router_layer` as typed: a whole number is an index, a number with a point is a fraction."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens are sent to experts. The fields are flags of the commands that train.

    Raises:
        ValueError: for values out of range; one message holds all problems of a config.
    """

    top_k: int = field(default=1, metadata={"help": "Experts per token, 1 to num_experts."})
    """Experts per token in sparse delegation, from 1 to the number of experts."""

    top_p: float = field(
        default=1.0,
        metadata={
            "flag": "router_top_p",
            "help": TOP_P_HELP,
        },
    )
    """A token goes to the fewest experts whose probabilities reach this sum, and to at most `top_k` (Huang et al. 2024,
    arXiv:2403.07652). A token whose best expert reaches it alone goes to that one with weight exactly 1. With 1 every
    token goes to `top_k` experts."""

    router_layer: str | int | float = field(
        default=EMBEDDINGS,
        metadata={
            "read": parse_router_layer,
            "help": "Where the router reads: embeddings, a layer's index (7), a fraction of the depth (0.25), or "
            "final. A deeper layer distinguishes skills with the same words, but layers below it carry no experts; "
            "final runs the base twice.",
        },
    )
    """The place where the router reads: "embeddings", a layer's index (the hidden states entering that layer), or
    a fraction of the depth between 0 and 1. Layers below it carry no adapters. "final" means the last hidden
    states of a pass of the base alone, before the pass with the experts, which is twice the work."""

    granularity: str = field(
        default=TOKEN,
        metadata={
            "help": "What is routed: each token on its own; a sequence as a whole, decided on its prompt; or each "
            "response of a conversation, decided as it begins, while whatever stands before it is read by the base.",
            "choices": [TOKEN, SEQUENCE, RESPONSE],
        },
    )
    """"token": every token is routed on its own. "sequence": a text is routed as a whole, by what the router
    reads at the last token of its prompt, and its generated tokens are routed likewise. "response": each answer of a
    conversation is routed as a whole, by what the router reads as it begins, and every other token goes to the
    unchanged base, so that one cache of a conversation serves all experts (as with aLoRA, Greenewald et al. 2025,
    arXiv:2504.12397, where the user chooses the one adapter)."""

    policy: str = field(
        default=LEARNED,
        metadata={
            "flag": "router_policy",
            "help": "What routes: a gate that learns; or, to compare with it, uniform (each token to all experts "
            "equally) or random (to top_k experts that have nothing to do with what the text says).",
            "choices": [LEARNED, UNIFORM, RANDOM],
        },
    )
    """"learned": the gate decides, and learns. The others are for comparison, with a gate that stays as it was drawn.
    "uniform": every token is sent to all experts equally. "random": every token is sent to `top_k` experts equally, by
    a fixed pseudo-random function of the gate's input, so a text is always routed the same way, whatever it says."""

    router_half_life: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Half-life of the router's memory, in tokens; shorter follows a change of subject faster. Default "
            "32, and 16 with granularity response."
        },
    )
    """Half-life, in tokens, of the causal exponential mean that the gate reads; None: 32, and 16 with granularity
    "response"."""

    change_rate: float = field(default=0.0, metadata={"flag": None})
    """The probability that the subject changes at a token, of the filter through which a gate that follows the skill
    library reads a text (`dylo_moe.routing.belief`); 0: no filter, the gate reads the mean alone. A gate that is
    trained, or does not decide by token, has none."""

    turns: Any = field(default=None, metadata={"flag": None})
    """With granularity "response", the tokens that open and close an answer: a `TurnTokens` of routing/turn_tokens.py,
    or its fields in a dict. None: those of the chat template of the base's tokenizer, which `from_base` looks up."""

    temperature: float = field(default=1.0, metadata={"flag": None})
    """Divides the gate logits of dense collaboration; towards 0 it becomes top-1."""

    z_loss_coefficient: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    """Weight of the router z-loss, mean(logsumexp(logits)^2)."""

    entropy_coefficient: float = field(
        default=0.0,
        metadata={"help": "Weight of the entropy of a token's routing; above 0 makes the router surer."},
    )
    """Weight of the mean entropy of a token's routing, in nats; positive makes the router surer."""

    def __post_init__(self) -> None:
        if self.router_half_life is None:
            object.__setattr__(self, "router_half_life", self._default_half_life)
        problems = []
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
            problems.append(f"top_k is {self.top_k!r}; it must be a whole number of at least 1")
        if not _is_router_layer(self.router_layer):
            problems.append(
                f"router_layer is {self.router_layer!r}; it must be 'embeddings', a layer's index (0 or more), "
                "a fraction of the depth between 0 and 1, or 'final'"
            )
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p!r}; it must be a number above 0 and at most 1")
        problems += choice_problems(self)
        if not is_number(self.change_rate) or not 0 <= self.change_rate < 1:
            problems.append(f"change_rate is {self.change_rate!r}; it must be a number of at least 0 and below 1")
        elif self.change_rate and self.granularity != TOKEN:
            problems.append(
                f"change_rate is {self.change_rate!r}, which has no meaning with granularity {self.granularity!r}, "
                "where tokens are not routed on their own; leave it out"
            )
        if self.per_response and self.reads_final:
            problems.append(
                "router_layer is 'final', which granularity 'response' cannot have: what the base says of an answer "
                "would need a second pass; use 'embeddings' or a layer's index"
            )
        if self.turns is not None and not self.per_response:
            problems.append(f"turns is given, which has no meaning with granularity {self.granularity!r}; leave it out")
        for name in ("router_half_life", "temperature"):
            if not is_number(getattr(self, name)) or not 0 < getattr(self, name) < math.inf:
                problems.append(f"{name} is {getattr(self, name)!r}; it must be a finite number above 0")
        for name in ("z_loss_coefficient", "entropy_coefficient"):
            if not is_number(getattr(self, name)) or not math.isfinite(getattr(self, name)):
                problems.append(f"{name} is {getattr(self, name)!r}; it must be a finite number")
        problems += self._turns_problems()
        problems += [] if problems else self._policy_problems()
        if problems:
            raise ValueError("RouterConfig: " + "; ".join(problems))

    def _turns_problems(self) -> list[str]:
        """What is wrong with `turns`; a dict, as a checkpoint holds them, becomes `TurnTokens`."""
        if self.turns is None or isinstance(self.turns, TurnTokens):
            return []
        if not isinstance(self.turns, dict):
            return [f"turns is {self.turns!r}; it must be TurnTokens, a dict of its fields, or None"]
        try:
            object.__setattr__(self, "turns", TurnTokens(**self.turns))
        except (TypeError, ValueError) as error:
            return [f"turns is {self.turns!r}: {error}"]
        return []

    def _policy_problems(self) -> list[str]:
        """What cannot apply where nothing is learned, or, with "uniform", nothing is chosen."""
        without_meaning = {LEARNED: (), RANDOM: (*OF_LEARNING, "top_p"), UNIFORM: (*OF_LEARNING, *OF_CHOOSING)}[
            self.policy
        ]
        defaults = {item.name: item.default for item in fields(self)} | {"router_half_life": self._default_half_life}
        problems = [
            f"{name} is {getattr(self, name)!r}, which has no meaning with policy {self.policy!r}; leave it out"
            for name in without_meaning
            if defaults[name] is not None and getattr(self, name) != defaults[name]
        ]
        if self.policy == UNIFORM and self.reads_final:
            problems.append("router_layer is 'final', which has no meaning with policy 'uniform'; leave it out")
        return problems

    @property
    def _default_half_life(self) -> float:
        if self.change_rate:
            return FILTERED_HALF_LIFE
        return RESPONSE_HALF_LIFE if self.per_response else HALF_LIFE

    @property
    def is_learned(self) -> bool:
        """Whether the gate decides."""
        return self.policy == LEARNED

    @property
    def reads_final(self) -> bool:
        """Whether a pass of the base alone comes first."""
        return self.router_layer == FINAL

    @property
    def per_sequence(self) -> bool:
        """Whether a text is routed as a whole."""
        return self.granularity == SEQUENCE

    @property
    def per_response(self) -> bool:
        """Whether each answer of a conversation is routed as a whole, and the base reads all else."""
        return self.granularity == RESPONSE

    def layer_index(self, num_layers: int) -> int:
        """Index of the first layer that carries experts, in a model of `num_layers` layers; the routing is
        known as that layer begins.

        Raises:
            ValueError: when the index is not below `num_layers`.
        """
        if self.router_layer in (EMBEDDINGS, FINAL):
            return 0
        if isinstance(self.router_layer, float):
            return int(self.router_layer * num_layers)
        index = int(self.router_layer)
        if index >= num_layers:
            raise ValueError(
                f"router_layer is {index}, but the base has {counted(num_layers, 'layer')}: use 0 to {num_layers - 1}, "
                "so that at least one layer is left to carry experts"
            )
        return index


@dataclass(frozen=True, kw_only=True)
class GrowingRouterConfig(RouterConfig):
    """How tokens are sent to the experts of a pool that grows: with other defaults than those of `RouterConfig`.

    A gate that follows from the skill library knows how sure it is at each place of a text. Where it is unsure, as in
    the first tokens, a mixture of the likely experts costs less than one wrong expert (docs/continual.md has figures).
    `top_k=1` gives each token to one expert, for engines that serve no mixtures.
    """

    top_k: int = field(default=4, metadata={"help": "The most experts of a token; 1: always one, never a mixture."})

    top_p: float = field(
        default=0.9,
        metadata={
            "flag": "router_top_p",
            "help": TOP_P_HELP,
        },
    )

    router_half_life: float = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "Half-life of the router's memory, in tokens; default 8 with a change rate (a filter remembers "
            "longer by itself), 16 with granularity response, and else 32."
        },
    )

    change_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "flag": "router_change_rate",
            "help": "How likely a text changes its subject at a token; larger follows a change faster. 0: the gate "
            "reads a mean that forgets with its half-life. Default 0.01, and 0 with granularity sequence or response.",
        },
    )

    def __post_init__(self) -> None:
        if self.change_rate is None:
            object.__setattr__(self, "change_rate", CHANGE_RATE if self.granularity == TOKEN else 0.0)
        super().__post_init__()


def _is_router_layer(value: object) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return value >= 0
    if isinstance(value, float):
        return 0 < value < 1
    return value in (EMBEDDINGS, FINAL)
