"""Whether a base draws random numbers in training, seen by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.base.frozen import keep_in_eval, switch_off_dropout
from dylo_moe.base.running import modes_of, random_state_of, run_tokens


def noise_problem(base: PreTrainedModel) -> str | None:
    """Where a base draws random numbers in training that change what it computes, in words; None: nowhere.

    Its own dropout is switched off for good, and it is run on a few tokens. One that cannot be run, or whose weights
    are elsewhere, is not judged.

    Args:
        base: without adapters.
    """
    switch_off_dropout(base)
    if any(parameter.is_meta for parameter in base.parameters()):
        return None
    with modes_of(base):
        base.train()
        keep_in_eval(base)
        try:
            place = _noisy(base)
        except Exception:  # of any model code; what it cannot do with tokens is told where it is probed
            return None
    if place is None:
        return None
    return (
        f"{type(base).__name__} draws random numbers in training that cannot be switched off, in {place} "
        f"({type(base.get_submodule(place)).__name__}); a frozen base must compute the same for the same tokens"
    )


def _noisy(base: PreTrainedModel) -> str | None:
    """The first module that computes something else with another seed."""
    with random_state_of(base, seed=0):
        before = _random_states(base)
        run_tokens(base)
        if all(torch.equal(one, other) for one, other in zip(before, _random_states(base), strict=True)):
            return None
    first, again, other = (_outputs(base, seed) for seed in (0, 0, 1))
    for (name, value), (_, same), (_, changed) in zip(first, again, other, strict=False):
        # Kernels of a GPU may add in another order each time; what is random differs by more than that.
        if value.shape != changed.shape or (changed - value).abs().max() > 10 * (same - value).abs().max():
            return name
    return None


def _random_states(base: PreTrainedModel) -> list[Tensor]:
    on_gpu = base.device.type == "cuda"
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(base.device)] if on_gpu else [])]


def _outputs(base: PreTrainedModel, seed: int) -> list[tuple[str, Tensor]]:
    """What each module returned with this seed, in the order in which they ended."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            if isinstance(value, Tensor) and value.is_floating_point():
                outputs.append((name, value.float()))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in base.named_modules()]
    try:
        with random_state_of(base, seed=seed):
            run_tokens(base)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
