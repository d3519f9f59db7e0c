"""How fast this processor multiplies in bf16, which some processors do several times slower than in fp32."""

from __future__ import annotations

import statistics
import time

import torch

ROWS, WIDTH = 512, 1024
"""The shapes of the products that are measured: a batch of tokens, and a square linear."""

TURNS = 5


def bf16_over_fp32() -> float:
    """The time of a product in bf16 over that of the same product in fp32, on this machine's CPU as it is now.

    Both are measured in turns, some milliseconds each; the median of the turns is returned.
    """
    inputs, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    pairs = [(inputs.to(dtype), weight.to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    for left, right in pairs:  # the first product sets up the kernels
        left @ right
    return statistics.median(_seconds(*pairs[0]) / _seconds(*pairs[1]) for _ in range(TURNS))


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    left @ right
    return max(time.perf_counter() - started, 1e-9)
