"""Routed layers on a base that bitsandbytes holds in 4 or 8 bits.

Nothing of the mathematics differs: PEFT's layer asks the quantised linear for W x, and the experts are added to it.
Its layers import bitsandbytes, which takes seconds, so ours are made when the first of them is met.
"""

from __future__ import annotations

from typing import Any

from .layer import ROUTED_CLASSES, RoutedLayer

PEFT_HOME = "peft.tuners.lora.bnb"
QUANTIZED = {"RoutedLinear4bit": "Linear4bit", "RoutedLinear8bitLt": "Linear8bitLt"}
"""Our classes, and PEFT's that each one routes."""


def routed_class(kind: type) -> type | None:
    """The routed class of a PEFT layer class, or `kind` itself where it is one; None where it cannot be routed."""
    if issubclass(kind, RoutedLayer):
        return kind
    if kind.__module__ == PEFT_HOME:
        return next((_made(ours) for ours, theirs in QUANTIZED.items() if theirs == kind.__name__), None)
    return ROUTED_CLASSES.get(kind)


def _made(name: str) -> type:
    """One class for one name, kept as an attribute of this module, where pickle looks for it."""
    if name not in globals():
        from peft.tuners.lora import bnb

        kind = getattr(bnb, QUANTIZED[name])
        text = f"PEFT's LoRA around bitsandbytes' `{QUANTIZED[name]}`, routed."
        globals()[name] = type(name, (RoutedLayer, kind), {"__module__": __name__, "__doc__": text})
    return globals()[name]


def __getattr__(name: str) -> Any:
    """For pickle, which may ask for a class before any layer of it was met."""
    if name in QUANTIZED:
        return _made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
