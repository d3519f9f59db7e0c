"""Find out what opens and closes an answer in the chat template that comes with a base model."""

from __future__ import annotations

from transformers import PreTrainedModel

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.data.turn_tokens import find_turn_tokens
from dylo_moe.routing.turn_tokens import TurnTokens


def turns_of_base(base: PreTrainedModel | str) -> TurnTokens:
    """The tokens that open and close an answer in the chat template of a base's own tokenizer.

    Args:
        base: a name or a folder as `load_base` takes it, or a loaded model, whose `name_or_path` says where it is from.

    Raises:
        ValueError: where that tokenizer cannot be loaded or has no template from which they follow.
    """
    name = base if isinstance(base, str) else base.name_or_path
    remedy = "give them as RouterConfig(turns=find_turn_tokens(tokenizer)), or use granularity='token'"
    if not name:
        raise ValueError(
            f"granularity is 'response', and this base does not say where its tokenizer is from, whose chat template "
            f"tells which tokens open and close an answer: {remedy}"
        )
    try:
        tokenizer = load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"granularity is 'response', and the tokenizer of {name}, whose chat template tells which tokens open and "
            f"close an answer, cannot be loaded ({error}): {remedy}"
        ) from error
    return find_turn_tokens(tokenizer)
