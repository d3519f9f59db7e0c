"""What a base can read: token ids that have an embedding, and positions that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel


class BaseLimits(NamedTuple):
    """The limits of a base. Both problems would otherwise be an IndexError of an embedding, on a GPU an assertion."""

    name: str
    """How messages call the base."""
    embeddings: int
    """The number of token ids."""
    learned_positions: int | None
    """The longest row that it can read, in tokens, where each position has an embedding of its own; None where
    positions are computed, so that any row can be read."""
    context: int | None
    """The longest row that it was trained for, where its config says so."""

    def length_problem(self, length: int, what: str) -> str | None:
        """What is wrong with rows of `length` tokens; None: nothing.

        Args:
            what: what has that length, with the way to shorten it, such as "--max_seq_length".
        """
        if self.learned_positions is None or length <= self.learned_positions:
            return None
        return f"{what} is {length:,} tokens, but {self.name} has learned {self.learned_positions:,} positions"

    def length_note(self, length: int, what: str) -> str | None:
        """What to know of rows of `length` tokens that the base can read, but was not trained for; None: nothing."""
        if self.context is None or length <= self.context:
            return None
        return f"{what} is {length:,} tokens, and {self.name} was trained on rows of up to {self.context:,}"

    def continuation_problem(self, prompt: int, new: int) -> str | None:
        """What is wrong with `new` tokens after a prompt of `prompt` tokens; None: nothing."""
        if self.context is None or prompt + new <= self.context:
            return None
        room = self.context - prompt
        rule = f"give --max_new_tokens {room} or less" if room > 0 else "give a shorter --prompt"
        return (
            f"the prompt has {prompt:,} tokens and --max_new_tokens is {new:,}, but {self.name} reads {self.context:,} "
            f"tokens: {rule}"
        )

    def token_problem(self, ids: Sequence[int], what: str) -> str | None:
        """What is wrong with the token ids of `what`; None: nothing."""
        highest = max(ids, default=0)
        if highest < self.embeddings:
            return None
        return (
            f"{what} has the token id {highest:,}, but {self.name} has {self.embeddings:,} embeddings, for ids from 0: "
            "its tokenizer has tokens that were never given to the model"
        )


def context_of(base: PreTrainedModel) -> int | None:
    """The longest text that a base was trained to read, in tokens; None where its config does not say."""
    return getattr(base.config.get_text_config(), "max_position_embeddings", None)


def limits_of(base: PreTrainedModel) -> BaseLimits:
    """The limits of a base, which may be without weights."""
    context = context_of(base)
    is_learned = any(
        isinstance(module, nn.Embedding) and ("position" in name or name.rpartition(".")[2] == "wpe")
        for name, module in base.named_modules()
    )
    embeddings: Any = base.get_input_embeddings()
    return BaseLimits(
        name=base.name_or_path or type(base).__name__,
        embeddings=embeddings.weight.shape[0],
        learned_positions=context if is_learned else None,
        context=context,
    )
