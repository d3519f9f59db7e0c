"""Print which skills of different experts the novelty detector takes for each other, and how to merge their experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dylo_moe.continual.confusable import Confusable
from dylo_moe.training.fit import command
from dylo_moe.utils.screen import Screen


def show_confusable(screen: Screen, pairs: Sequence[Confusable], checkpoint: str | Path, *, most: int) -> None:
    """Print a sentence for each pair, and the command that makes one expert of the two.

    Args:
        checkpoint: the folder that the command names.
        most: of more pairs than so many only the nearest are shown, and how many there are.
    """
    for pair in pairs[:most]:
        screen.say(pair.in_words())
        screen.copyable(f"  {command()} experts merge {checkpoint} {' '.join(pair.experts)} --output merged")
    if len(pairs) > most:
        screen.say(f"These are the nearest {most} of {len(pairs):,} such pairs.")
