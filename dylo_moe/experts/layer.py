"""One routed linear: y = W x + s_0 B_0 A_0 x + sum_e w_e s_e B_e A_e x, where expert 0 is the shared one, if any.

Shapes: T tokens of all rows, D in, O out, r rank of one expert.

A routed linear is PEFT's own LoRA layer with another forward. How the tokens of a forward are sent to
experts is computed once, in a `Dispatch`; every routed linear of that forward reads the same one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from dylo_moe.experts.kernels import mix
from dylo_moe.routing.dispatch import ExpertShape, Layout
from dylo_moe.routing.forward_context import ContextSlot

PEFT_HOME = "peft.tuners.lora.bnb"

QUANTIZED = {"RoutedLinear4bit": "Linear4bit", "RoutedLinear8bitLt": "Linear8bitLt"}
"""Our routed classes, and the class of PEFT that each one replaces."""


class Adapter(NamedTuple):
    """One expert in one routed linear. The modules are PEFT's; their weights are read at each call."""

    shape: ExpertShape
    down: nn.Linear
    """A, [r, D]."""
    up: nn.Linear
    """B, [O, r]."""


class RoutedLayer:
    """Mixin placed before a PEFT LoRA class: its forward mixes all experts by the routing of the forward.

    Disabled or merged it is PEFT, unchanged. LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3. We differ
    in one thing: the experts of a layer share one dropout mask.
    """

    context_slot: ContextSlot
    adapters: dict[str, Adapter]
    """The experts of this layer, in gate order; the shared one comes last."""
    layout: Layout
    """The shapes of the experts; layers with equal shapes share one object."""
    expert_dropout: float
    base_layer: nn.Module
    merged_adapters: list[str]
    training: bool

    def bind(self, context_slot: ContextSlot, names: Iterable[str], *, shared: str | None = None) -> None:
        """Note which of the pool's experts this layer has.

        Args:
            names: the experts that tokens are routed to, in gate order.
            shared: the name of the expert that all tokens use; None: there is none.

        Raises:
            ValueError: if they differ in dropout.
        """
        self.context_slot = context_slot
        down, up, dropout = self.lora_A, self.lora_B, self.lora_dropout  # type: ignore[attr-defined]
        routed = [name for name in names if name in down]
        names = routed if shared is None or shared not in down else [*routed, shared]
        ranks, scaling = self.r, self.scaling  # type: ignore[attr-defined]
        shapes = [ExpertShape(name, ranks[name], scaling[name]) for name in names]
        self.adapters = {shape.name: Adapter(shape, down[shape.name], up[shape.name]) for shape in shapes}
        self.layout = Layout(shapes[: len(routed)], next(iter(shapes[len(routed) :]), None))
        probabilities = {name: getattr(dropout[name], "p", 0.0) for name in names}
        if len(set(probabilities.values())) > 1:
            raise ValueError(
                f"experts of one layer share a dropout mask, but lora_dropout differs: {probabilities}; "
                "give all the same"
            )
        self.expert_dropout = next(iter(probabilities.values()), 0.0)
        for name in names[1:]:  # one module for all takes less memory for each expert
            if dropout[name] is not dropout[names[0]]:
                dropout[name] = dropout[names[0]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x [..., D] to [..., O], in the dtype of the base's linear."""
        if self.disable_adapters or self.merged:  # type: ignore[attr-defined]
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        result = self.base_layer(x, *args, **kwargs)
        dispatch = self.context_slot.dispatch(num_tokens=x.numel() // x.shape[-1])
        parts = [part for part in (dispatch.shared.get(self.layout), dispatch.parts[self.layout]) if part is not None]
        if not parts:
            return result
        x_TD = x.reshape(-1, x.shape[-1])
        if x_TD.dtype != dispatch.dtype:
            # PEFT's private method, as in its own forward, so that its public `disable_input_dtype_casting` applies.
            x_TD = self._cast_input_dtype(x_TD, dispatch.dtype)  # type: ignore[attr-defined]
        if self.training and self.expert_dropout > 0:
            x_TD = F.dropout(x_TD, self.expert_dropout)
        for part in parts:
            # `_parameters` avoids nn.Module's look-up of attributes, which takes longer than a product with one token.
            adapters = [self.adapters[name] for name in part.names]
            downs: list[Any] = [adapter.down._parameters["weight"] for adapter in adapters]
            ups: list[Any] = [adapter.up._parameters["weight"] for adapter in adapters]
            result = mix(x_TD, result, part=part, downs=downs, ups=[up.t() for up in ups])
        return result


class RoutedLinear(RoutedLayer, lora.Linear):
    """PEFT's LoRA around `nn.Linear` (or Conv1D), routed."""


ROUTED_CLASSES: dict[type, type] = {lora.Linear: RoutedLinear}
"""The routed class of each PEFT layer class. It is at module level so that models can be pickled."""


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which products with this adapter matrix are computed: its own, or autocast's."""
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype


def routed_class(kind: type) -> type | None:
    """The routed class of a PEFT layer class, or `kind` itself if it is one; None if it cannot be routed."""
    if issubclass(kind, RoutedLayer):
        return kind
    if kind.__module__ == PEFT_HOME:
        return next((_made(ours) for ours, theirs in QUANTIZED.items() if theirs == kind.__name__), None)
    return ROUTED_CLASSES.get(kind)


def _made(name: str) -> type:
    """The routed class of a name, made once and kept as an attribute of this module, where pickle looks for it."""
    if name not in globals():
        from peft.tuners.lora import bnb

        kind = getattr(bnb, QUANTIZED[name])
        text = f"PEFT's LoRA around bitsandbytes' `{QUANTIZED[name]}`, routed."
        globals()[name] = type(name, (RoutedLayer, kind), {"__module__": __name__, "__doc__": text})
    return globals()[name]


def __getattr__(name: str) -> Any:
    """Make a routed class for pickle, which may ask for it before any layer of that class was seen."""
    if name in QUANTIZED:
        return _made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
