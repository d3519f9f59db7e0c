"""A law compares two ways of computing the same thing, and the largest difference ever seen is written down.

`pytest --laws` prints the table: each law, what it was compared on, how often, and the largest difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

KEY = "law"


class Comparison(NamedTuple):
    """One comparison of a law, as it travels in a test's report."""

    law: str
    family: str
    difference: float
    bound: float


class Laws:
    """What the `laws` fixture gives to a test.

    Args:
        record: takes a name and a value into the test's report.
    """

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def close(self, law: str, ours: Tensor, theirs: Tensor, *, family: str = "llama", atol: float) -> None:
        """The largest absolute difference is at most `atol`; infinities and NaN must stand in the same places."""
        assert ours.shape == theirs.shape, f"{law}: {list(ours.shape)} against {list(theirs.shape)}"
        ours, theirs = ours.detach().double(), theirs.detach().double()
        assert torch.equal(ours.isfinite(), theirs.isfinite()), f"{law}: not finite in different places"
        both = ours.isfinite()
        difference = float((ours[both] - theirs[both]).abs().max()) if both.any() else 0.0
        self._record(KEY, list(Comparison(law, family, difference, atol)))
        assert difference <= atol, f"{law}: {family} differs by {difference:.3g}, allowed {atol:.3g}"

    def equal(self, law: str, ours: Tensor, theirs: Tensor, *, family: str = "llama") -> None:
        """Bit for bit, or token for token."""
        self.close(law, ours, theirs, family=family, atol=0.0)


def table(comparisons: list[Comparison]) -> str:
    """Markdown: one line for each law."""
    lines = [
        "| law | compared on | comparisons | largest difference | allowed |",
        "|---|---|---|---|---|",
    ]
    for law in sorted({comparison.law for comparison in comparisons}):
        own = [comparison for comparison in comparisons if comparison.law == law]
        families = ", ".join(sorted({comparison.family for comparison in own}))
        worst, bound = max(comparison.difference for comparison in own), max(comparison.bound for comparison in own)
        lines.append(
            f"| {law} | {families} | {len(own)} | {worst:.1e} | {bound:.0e} |".replace("0.0e+00", "0").replace(
                "0e+00", "0"
            )
        )
    return "\n".join(lines)
