"""An adapter's files: what stock PEFT writes, read and compared."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor


def read_adapter(path: str, **kwargs: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA adapter's config, ready to train on, and its tensors on the CPU.

    Args:
        path: a folder or a hub id.
        kwargs: of the hub: revision, subfolder, token, cache_dir.

    Raises:
        ValueError: where there is none, or one of another kind than LoRA.
    """
    try:
        config = PeftConfig.from_pretrained(path, **kwargs)
        state = load_peft_weights(path, device="cpu", **kwargs) if isinstance(config, LoraConfig) else {}
    except Exception as error:  # PEFT, safetensors, pickle and the hub raise errors of twelve kinds
        raise ValueError(f"adapter {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapter {path} is a {type(config).__name__}; experts are LoRA adapters")
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"adapter {path} holds something else than named tensors")
    config.inference_mode = False
    return config, state


def state_problems(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """What is wrong with the tensors of a file: missing, foreign, misshapen, not finite; none: nothing."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - state.keys())]
    problems += [f"{name} does not belong in it" for name in sorted(state.keys() - expected.keys())]
    for name in sorted(expected.keys() & state.keys()):
        if expected[name].shape != state[name].shape:
            problems.append(f"{name} has shape {list(state[name].shape)}, expected {list(expected[name].shape)}")
        elif not torch.isfinite(state[name].to(expected[name].dtype)).all():
            problems.append(f"{name} holds values that are not finite in {expected[name].dtype}")
    return problems
