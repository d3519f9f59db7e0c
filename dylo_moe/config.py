"""Every knob of ours, in dataclasses that check themselves.

What belongs to a neighbour stays with it: an expert's rank, alpha, dropout and targets are PEFT's
`LoraConfig`, the training loop's settings are the Trainer's arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EMBEDDINGS = "embeddings"
FINAL = "final"
TOKEN = "token"
SEQUENCE = "sequence"

NUM_EXPERTS = 4
LORA_R = 16
LORA_ALPHA = 32
LORA_DROPOUT = 0.05
BALANCE_COEFFICIENT = 0.01


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens are sent to experts.

    Raises:
        ValueError: for values out of range; all problems of one config in one message.
    """

    top_k: int = 1
    """Experts per token in sparse delegation, from 1 to the number of experts."""

    router_layer: str | int | float = EMBEDDINGS
    """Where the router reads: "embeddings", a layer's index (the hidden states entering that layer), or
    a fraction of the depth between 0 and 1. Layers below it carry no adapters. "final": the last hidden
    states of a pass of the base alone, before the pass with the experts; twice the work."""

    granularity: str = TOKEN
    """"token": every token is sent on its own. "sequence": a text is sent as a whole, by what the router
    reads at the last token of its prompt, and that holds for all of it, generated tokens included."""

    router_half_life: float = 32.0
    """Half-life, in tokens, of the causal exponential mean that the gate reads."""

    temperature: float = 1.0
    """Divides the gate logits of dense collaboration; towards 0 it becomes top-1."""

    z_loss_coefficient: float = 0.0
    """Weight of the router z-loss, mean(logsumexp(logits)^2)."""

    entropy_coefficient: float = 0.0
    """Weight of the mean entropy of a token's routing, in nats; positive makes the router surer."""

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
            problems.append(f"top_k is {self.top_k!r}; it must be a whole number of at least 1")
        if not _is_router_layer(self.router_layer):
            problems.append(
                f"router_layer is {self.router_layer!r}; it must be 'embeddings', a layer's index (0 or more), "
                "a fraction of the depth between 0 and 1, or 'final'"
            )
        if self.granularity not in (TOKEN, SEQUENCE):
            problems.append(f"granularity is {self.granularity!r}; it must be 'token' or 'sequence'")
        for name in ("router_half_life", "temperature"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) < math.inf:
                problems.append(f"{name} is {getattr(self, name)!r}; it must be a finite number above 0")
        for name in ("z_loss_coefficient", "entropy_coefficient"):
            if not _is_number(getattr(self, name)) or not math.isfinite(getattr(self, name)):
                problems.append(f"{name} is {getattr(self, name)!r}; it must be a finite number")
        if problems:
            raise ValueError("RouterConfig: " + "; ".join(problems))

    @property
    def reads_final(self) -> bool:
        """Whether a pass of the base alone comes first."""
        return self.router_layer == FINAL

    @property
    def per_sequence(self) -> bool:
        """Whether a text is routed as a whole."""
        return self.granularity == SEQUENCE

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
                f"router_layer is {index}, but the base has {num_layers} layers: use 0 to {num_layers - 1}, "
                "so that at least one layer is left to carry experts"
            )
        return index


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_router_layer(value: object) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return value >= 0
    if isinstance(value, float):
        return 0 < value < 1
    return value in (EMBEDDINGS, FINAL)


def parse_router_layer(text: str) -> str | int | float:
    """A `router_layer` as typed: a whole number is an index, a number with a point a fraction."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
