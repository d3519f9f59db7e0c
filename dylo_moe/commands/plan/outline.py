"""The model of a run without its weights: all layers with one expert, and a few layers with a few experts.

The few stand for the others that are like them: each further layer, and each further expert, takes as much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from dylo_moe.base.loading import load_base_without_weights
from dylo_moe.base.stack import decoder_layers
from dylo_moe.commands.plan.base_config import base_config
from dylo_moe.commands.train.request import Arguments
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import TOKEN, UNIFORM
from dylo_moe.training.build import build_model

LAYERS_OF_A_KIND = 3
"""So many layers of each kind are kept: a lowest one, a highest one, and one between them, which is what each of the
others adds."""

FEW_EXPERTS, MORE_EXPERTS = 3, 5
"""The two numbers of experts that are followed where a run has more of them, and sends each token to one."""

MOST_SELECTED = 64
"""The most experts of a token that are followed, unless a token is sent to all."""


class Arrangement(NamedTuple):
    """A choice among the few layers."""

    positions: list[int]
    """The layers' positions, in the order of the model."""
    missing: int = 0
    """How many more layers there are of the kind that this one has a third of."""


class Pool(NamedTuple):
    """A number of experts, and how many of them a token is sent to."""

    num_experts: int
    top_k: int


class Outline(NamedTuple):
    """A model on the meta device, of which everything can be counted and whose steps are quick to follow."""

    arguments: Arguments
    """What the run was asked for."""
    autocast: torch.dtype | None
    """What the Trainer computes in; None: the weights' own dtypes."""
    whole: DyLoRAMoE
    """All layers, with one expert: experts are alike, and injecting many into a deep model takes long."""
    few: tuple[DyLoRAMoE, ...]
    """Up to `LAYERS_OF_A_KIND` layers of each kind: with all experts, or, of many, with two smaller numbers of them."""
    first_routed: int
    """Position of the first of these layers that has experts."""
    arrangements: tuple[Arrangement, ...]
    """Up to two layers of each kind; then, for each kind that has more, the same with a third."""
    lists: dict[str, list[Any]]
    """What the base's config says of each of the few layers, as a list."""

    @property
    def num_experts(self) -> int:
        """The experts of the run."""
        return self.arguments.experts.num_experts

    @property
    def is_dense(self) -> bool:
        """Whether each token is sent to all experts."""
        router = self.arguments.router
        return router.policy == UNIFORM or router.top_k == self.num_experts

    def with_all_experts(self, measure: Callable[[DyLoRAMoE], int]) -> int:
        """A number of the model with all experts, of which each adds as much.

        Args:
            measure: finds the number of a model with some of them.
        """
        return self.on_line([measure(model) for model in self.few])

    def on_line(self, found: Sequence[int]) -> int:
        """The same, from what was found for each of `few`."""
        if len(found) == 1:  # of all experts, or of those of the first model
            return found[0]
        fewer, more = (len(model.experts) for model in self.few)
        return found[0] + (found[1] - found[0]) * (self.num_experts - fewer) // (more - fewer)

    def arrange(self, model: DyLoRAMoE, layers: Sequence[nn.Module], positions: Sequence[int]) -> None:
        """Let one of the models of few layers have some of them.

        Args:
            layers: all of its few.
        """
        lists = {name: [values[position] for position in positions] for name, values in self.lists.items()}
        _keep(model.base, [layers[position] for position in positions], lists)


def outline(arguments: Arguments, *, bf16: bool = False) -> Outline:
    """The model of a run.

    Args:
        bf16: as with that flag; else as the flags say.

    Raises:
        ValueError: where the config cannot be had, or the flags do not fit it.
    """
    flags, experts, router, bf16 = arguments.model, arguments.experts, arguments.router, bf16 or arguments.train.bf16
    if router.per_response:  # a tokenizer is not needed for a bound: that of rows whose tokens are all an answer's
        router = replace(router, granularity=TOKEN)
    autocast = torch.bfloat16 if bf16 else torch.float16 if arguments.train.fp16 else None
    pools = followed_pools(Pool(experts.num_experts, router.top_k), to_all=router.policy == UNIFORM)
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
    few = tuple(
        build_model(
            flags,
            replace(experts, num_experts=pool.num_experts),
            replace(router, top_k=pool.top_k),
            bf16=bf16,
            load=shortened,
        )
        for pool in pools
    )
    return Outline(arguments, autocast, whole, few, below, tuple(_arrangements(kinds.values(), chosen)), lists)


def followed_pools(pool: Pool, *, to_all: bool) -> list[Pool]:
    """The pools that stand for one: itself, or, of many experts, two smaller ones, on a line with it.

    Args:
        to_all: the router sends each token to all experts, whatever `top_k`.

    Raises:
        ValueError: where a token is sent to many experts, and not to all.
    """
    if pool.top_k > pool.num_experts:
        return [pool]  # refused by the model itself
    if to_all or pool.top_k == pool.num_experts:
        smaller = [Pool(count, 1 if to_all else count) for count in (FEW_EXPERTS, MORE_EXPERTS)]
    elif pool.top_k <= MOST_SELECTED:
        smaller = [Pool(count + pool.top_k - 1, pool.top_k) for count in (FEW_EXPERTS, MORE_EXPERTS)]
    else:
        raise ValueError(
            f"top_k is {pool.top_k:,} of {pool.num_experts:,} experts, and a plan follows at most {MOST_SELECTED}, "
            "or all; choose another top_k"
        )
    return [pool] if pool.num_experts <= smaller[-1].num_experts else smaller


def base_without_weights(name: str, **options: Any) -> PreTrainedModel:
    """A base on the meta device; the configs that come with this package are known too."""
    return load_base_without_weights(name, read_config=base_config, **options)


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
