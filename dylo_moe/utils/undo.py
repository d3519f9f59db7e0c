"""Attempts that leave no trace where they fail."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONTAINERS = (dict, OrderedDict, list, set)
"""What an attribute may be for its contents to come back too: the hooks, children and parameters of a module are."""


class _State(NamedTuple):
    """What one object was."""

    item: Any
    kind: type
    attributes: dict[str, Any]
    held: list[tuple[Any, Any]]
    """Its containers, each with a copy of what it held."""


@contextmanager
def all_or_nothing(objects: Iterable[Any], *, values: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put objects back as they were if the `with` block raises anything, a keyboard interrupt included.

    What comes back: the class of each object, its attributes, what the dicts, lists and sets among these hold, whether
    its parameters need gradients, and PyTorch's random state of the CPU. Parameters and other objects are the same ones
    as before, and their values are left alone.

    Args:
        objects: all that the block may change; not what they refer to.
        values: tensors that it may change in place, whose values come back too.
    """
    states = [_state(item) for item in objects]
    parameters = [
        parameter
        for state in states
        if isinstance(state.item, nn.Module)
        for parameter in state.item._parameters.values()
        if parameter is not None
    ]
    needs = [parameter.requires_grad for parameter in parameters]
    before = [(tensor, tensor.detach().clone()) for tensor in values]
    random = torch.get_rng_state()
    try:
        yield
    except BaseException:
        for state in states:
            _restore(state)
        for parameter, needed in zip(parameters, needs, strict=True):
            parameter.requires_grad_(needed)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        torch.set_rng_state(random)
        raise


def _state(item: Any) -> _State:
    attributes = dict(vars(item))
    held = [(value, value.copy()) for value in attributes.values() if type(value) in CONTAINERS]
    return _State(item, type(item), attributes, held)


def _restore(state: _State) -> None:
    for container, before in state.held:  # the same container, because handles of hooks, for example, refer to it
        container.clear()
        if isinstance(container, list):
            container.extend(before)
        else:
            container.update(before)
    if type(state.item) is not state.kind:
        state.item.__class__ = state.kind
    vars(state.item).clear()
    vars(state.item).update(state.attributes)
