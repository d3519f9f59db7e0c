"""Run a base on a few tokens, to see what it does, and leave no trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROWS, TOKENS = 2, 4
"""The shape of the few tokens of `run_tokens`."""


@torch.no_grad()
def run_tokens(base: PreTrainedModel, **inputs: Any) -> Any:
    """The output of a base for a few tokens, without gradients.

    Args:
        inputs: of the base, beside the tokens.
    """
    return base(input_ids=plain_ids(base, ROWS * TOKENS).view(ROWS, TOKENS), return_dict=True, **inputs)


def plain_ids(base: PreTrainedModel, count: int) -> Tensor:
    """Token ids that the base's config does not give a meaning of their own, on the device of its embeddings."""
    weight: Any = base.get_input_embeddings().weight
    values = [value for name, value in _entries(base.config.to_dict()) if name.endswith(("_id", "_index", "_ids"))]
    taken = {value for value in values if isinstance(value, int)}
    plain = [index for index in range(min(weight.shape[0], count + len(taken))) if index not in taken]
    return torch.tensor((plain * count)[:count], device=weight.device)


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield from _entries(value) if isinstance(value, dict) else [(str(name), value)]


def hidden_states(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among the arguments of a decoder layer; None where there are none."""
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


@contextmanager
def modes_of(base: PreTrainedModel) -> Iterator[None]:
    """Put each module back into training or eval mode, as it was, after the `with` block."""
    modes = [(module, module.training) for module in base.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def random_state_of(base: PreTrainedModel, *, seed: int | None = None) -> Iterator[None]:
    """Put PyTorch's random state back after the `with` block, on the CPU and on the base's device.

    Args:
        seed: what the block draws with; None: from where the state is.
    """
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield
