"""The stack of decoder layers of a base: the one that the tokens of a text run through."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from dylo_moe.base.running import ROWS, TOKENS, hidden_states, random_state_of, run_tokens
from dylo_moe.utils.words import listed

FOUND = "_dylora_decoder_layers"
"""The attribute of a base that keeps the name of its stack, where the base had to be run to find it."""


def decoder_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The base's stack of decoder layers and its module name.

    It is the list of layers inside the base's text decoder. Where there are several, it is the one whose members a few
    tokens run through, each once and in order; encoders of images and other lists that are as long do not count.

    Args:
        base: with or without adapters injected, with weights or without.

    Raises:
        ValueError: if the architecture has no such stack, or tokens run through several, or through one repeatedly.
    """
    if FOUND in vars(base):
        name = vars(base)[FOUND]
        return name, cast(nn.ModuleList, base.get_submodule(name))
    stacks = _stacks(base)
    if not stacks:
        raise ValueError(
            f"{type(base).__name__} has no stack of decoder layers, so there is nothing to route; DyLoRA-MoE takes "
            "decoder-only causal language models"
        )
    if len(stacks) > 1:
        name = _found_by_running(base, stacks)
        setattr(base, FOUND, name)
        stacks = {name: stacks[name]}
    return next(iter(stacks.items()))


def _stacks(base: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The lists of layers in the base's text decoder, by name; those inside of layers are left out."""
    names = {id(module): name for name, module in base.named_modules()}
    # Transformers' own look-up is a guess: for some families it is a linear of the head.
    decoder: Any = base.get_decoder()
    found = dict(_outermost_lists(decoder, names[id(decoder)])) if id(decoder) in names else {}
    return found or dict(_outermost_lists(base, ""))


def _outermost_lists(module: nn.Module, path: str) -> list[tuple[str, nn.ModuleList]]:
    """The lists of modules that are made of others: lists of single linears, norms or rotations are no layers."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if not isinstance(child, nn.ModuleList):
            found += _outermost_lists(child, inner)
        elif len(child) and all(any(True for _ in member.children()) for member in child):
            found.append((inner, child))
    return found


def _found_by_running(base: PreTrainedModel, stacks: dict[str, nn.ModuleList]) -> str:
    """The name of the stack that a few tokens run through."""
    order: dict[str, list[int]] = {name: [] for name in stacks}
    handles = [
        layer.register_forward_pre_hook(_note(order[name], index), with_kwargs=True)
        for name, layers in stacks.items()
        for index, layer in enumerate(layers)
    ]
    problem = ""
    try:
        with random_state_of(base):
            run_tokens(base, use_cache=False)
    except Exception as error:  # of any kind: what was entered until then may be enough
        problem = f" It cannot be run on text alone: {type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
    entered = {name: indices for name, indices in order.items() if indices}
    once = [name for name, indices in entered.items() if indices == sorted(set(indices))]
    if len(entered) == len(once) == 1:
        return once[0]
    what = "runs tokens through several stacks of layers" if entered else "has several stacks of layers"
    if len(entered) == 1 or any(name not in once for name in entered):
        what = "runs tokens through its layers repeatedly"
    raise ValueError(
        f"{type(base).__name__} {what}, {listed(list(entered or stacks))}; experts are routed along one stack, whose "
        f"layers run once each.{problem}"
    )


def _note(entered: list[int], index: int) -> Any:
    """A hook that notes that a layer was given hidden states of the tokens."""

    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = hidden_states(args, kwargs)
        if hidden is not None and hidden.shape[-3:-1] == (ROWS, TOKENS):
            entered.append(index)

    return hook
