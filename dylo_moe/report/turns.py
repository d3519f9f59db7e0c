"""Say in words who wrote the answers of a text, where routing is decided once for each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dylo_moe.utils.words import counted


class Answer(NamedTuple):
    """One answer of a text: a `Turn` as a page can read it, without PyTorch."""

    num_tokens: int
    experts: Mapping[str, float]
    """The routing weight of each expert that wrote it; empty: the unchanged base."""


def turns_in_words(answers: Sequence[Answer], *, num_tokens: int) -> list[str]:
    """A line for each answer, and one for the rest of the text.

    Args:
        answers: in their order.
        num_tokens: of the whole text.
    """
    if not answers:
        return ["no answer begins in this text, so that the unchanged base read and wrote all of it"]
    lines = [
        f"answer {number}, {counted(answer.num_tokens, 'token')}: written by {writers_in_words(answer.experts)}"
        for number, answer in enumerate(answers, 1)
    ]
    rest = num_tokens - sum(answer.num_tokens for answer in answers)
    return [*lines, f"the other {counted(rest, 'token')}: read by the unchanged base"] if rest > 0 else lines


def writers_in_words(experts: Mapping[str, float]) -> str:
    """The experts of an answer, the one with the largest routing weight first; the weights where there are several."""
    ranked = sorted(experts.items(), key=lambda item: -item[1])
    if len(ranked) < 2:
        return ranked[0][0] if ranked else "the unchanged base"
    return ", ".join(f"{name} ({weight:.2f})" for name, weight in ranked)
