"""The tokens that open and close an answer, as a checkpoint holds them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TurnTokens:
    """The tokens that open and close an answer in a chat template.

    Raises:
        ValueError: for an empty sequence, ids that are no whole numbers of at least 0, or an index outside the opening.
    """

    opening: tuple[int, ...]
    """The ids of the whole header before an answer, such as those of "<|im_start|>assistant\\n"."""
    adapted_from: int
    """The index in `opening` of the token at which an answer is recognised. It is the first that the answer's expert
    reads; the ids up to it must stand before no other message."""
    endings: tuple[tuple[int, ...], ...]
    """What closes an answer: each the ids of one end, such as those of "<|im_end|>". The token that completes an end is
    read by the base again."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "opening", _ids("opening", self.opening))
        if not isinstance(self.endings, (list, tuple)) or not self.endings:
            raise ValueError(f"TurnTokens: endings is {self.endings!r}; it must hold the ids of at least one end")
        object.__setattr__(self, "endings", tuple(_ids("endings", ending) for ending in self.endings))
        index = self.adapted_from
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self.opening):
            raise ValueError(
                f"TurnTokens: adapted_from is {index!r}; it must be the index of a token of opening, from 0 to "
                f"{len(self.opening) - 1}"
            )

    @property
    def recognised(self) -> tuple[int, ...]:
        """The ids at the last of which an answer begins."""
        return self.opening[: self.adapted_from + 1]

    @property
    def adapted(self) -> tuple[int, ...]:
        """The ids of the header that an answer's expert reads; PEFT's `alora_invocation_tokens`."""
        return self.opening[self.adapted_from :]

    @property
    def longest(self) -> int:
        """The number of tokens that must be looked at to tell whether an answer begins or ends."""
        return max(map(len, (self.recognised, *self.endings)))


def _ids(name: str, ids: object) -> tuple[int, ...]:
    is_list = isinstance(ids, (list, tuple)) and len(ids) > 0
    if not is_list or not all(type(token) is int and token >= 0 for token in ids):  # type: ignore[attr-defined]
        raise ValueError(
            f"TurnTokens: {name} holds {ids!r}; it must be a list of token ids, whole numbers of 0 or more"
        )
    return tuple(ids)  # type: ignore[arg-type]
