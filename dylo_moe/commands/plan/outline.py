"""The model of a run without its weights: with all layers, and with a few that stand for those that are like them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dylo_moe.base.frozen import decoder_layers
from dylo_moe.commands.plan.known_shapes import base_config
from dylo_moe.commands.train.request import Arguments
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.training.build import build_model

LAYERS_OF_A_KIND = 3
"""So many layers of each kind are kept: a lowest one, a highest one, and one between them, which is what each of the
others adds."""


class Arrangement(NamedTuple):
    """A choice among the few layers."""

    positions: list[int]
    """The layers' positions, in the order of the model."""
    missing: int = 0
    """How many more layers there are of the kind that this one has a third of."""


class Outline(NamedTuple):
    """A model on the meta device, of which everything can be counted and whose steps are quick to follow."""

    arguments: Arguments
    """What the run was asked for."""
    autocast: torch.dtype | None
    """What the Trainer computes in; None: the weights' own dtypes."""
    whole: DyLoRAMoE
    """All layers, with one expert: experts are alike, and injecting many into a deep model takes long."""
    few: DyLoRAMoE
    """All experts, with up to `LAYERS_OF_A_KIND` layers of each kind."""
    first_routed: int
    """Position of the first of these that has experts."""
    arrangements: tuple[Arrangement, ...]
    """Up to two layers of each kind; then, for each kind that has more, the same with a third."""
    lists: dict[str, list[Any]]
    """What the base's config says of each of the few layers, as a list."""

    def arrange(self, layers: Sequence[nn.Module], positions: Sequence[int]) -> None:
        """Let the model have some of its few layers.

        Args:
            layers: all of the few.
        """
        lists = {name: [values[position] for position in positions] for name, values in self.lists.items()}
        _keep(self.few.base, [layers[position] for position in positions], lists)


def outline(arguments: Arguments, *, bf16: bool = False) -> Outline:
    """The model of a run.

    Args:
        bf16: as with that flag; else as the flags say.

    Raises:
        ValueError: where the config cannot be had, or the flags do not fit it.
    """
    flags, experts, router, bf16 = arguments.model, arguments.experts, arguments.router, bf16 or arguments.train.bf16
    autocast = torch.bfloat16 if bf16 else torch.float16 if arguments.train.fp16 else None
    one, to_one = replace(experts, num_experts=1), replace(router, top_k=1)
    whole = build_model(flags, one, to_one, bf16=bf16, load=base_without_weights)
    layers = list(decoder_layers(whole.base)[1])
    first = whole.router_config.layer_index(len(layers))
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(_kind(layer, has_experts=index >= first), []).append(index)
    chosen = sorted(index for kind in kinds.values() for index in kind[:LAYERS_OF_A_KIND])
    below = sum(index < first for index in chosen)
    config = whole.base.config.get_text_config()
    listed = {name: values for name, values in vars(config).items() if isinstance(values, list)}
    lists = {name: [values[i] for i in chosen] for name, values in listed.items() if len(values) == len(layers)}

    def shortened(name: str, **options: Any) -> PreTrainedModel:
        base = base_without_weights(name, **options)
        _, stack = decoder_layers(base)
        _keep(base, [stack[index] for index in chosen], lists)
        return base

    router = replace(router, router_layer=below) if first > 0 else router
    few = build_model(flags, experts, router, bf16=bf16, load=shortened)
    return Outline(arguments, autocast, whole, few, below, tuple(_arrangements(kinds.values(), chosen)), lists)


def base_without_weights(name: str, *, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    """A base on the meta device, from its config alone.

    Args:
        dtype: "auto": what the config says, else fp32.
        options: of `from_config`.
    """
    config = base_config(name)
    if isinstance(dtype, str):
        dtype = config.dtype or torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def _kind(layer: nn.Module, *, has_experts: bool) -> Any:
    """What is equal for layers that take as much memory in a step."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    return type(layer), shapes, has_experts


def _arrangements(kinds: Collection[list[int]], chosen: list[int]) -> Iterator[Arrangement]:
    pairs = {index for kind in kinds for index in kind[:2]}
    yield Arrangement([chosen.index(index) for index in sorted(pairs)])
    for kind in kinds:
        if len(kind) > 2:
            yield Arrangement([chosen.index(index) for index in sorted(pairs | {kind[2]})], len(kind) - 2)


def _keep(base: PreTrainedModel, layers: Sequence[nn.Module], lists: dict[str, list[Any]]) -> None:
    """Give a base these decoder layers, and its config what it lists for each."""
    _, stack = decoder_layers(base)
    del stack[:]
    stack.extend(layers)
    config = base.config.get_text_config()
    config.num_hidden_layers = len(layers)
    for name, values in lists.items():
        setattr(config, name, values)
