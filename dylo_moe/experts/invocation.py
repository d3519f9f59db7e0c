"""Activated LoRA (aLoRA): adapters that act from their invocation on, the tokens at which an answer begins.

PEFT looks for the last place of `alora_invocation_tokens` in what it is given, and adapts from the first of these
tokens to the end (Greenewald et al. 2025, arXiv:2504.12397). So an expert of a model that decides once an answer is
such an adapter for as long as there is one answer.
"""

from __future__ import annotations

from typing import NamedTuple

from peft import LoraConfig

from dylo_moe.routing.config import RESPONSE, RouterConfig
from dylo_moe.routing.turn_tokens import TurnTokens
from dylo_moe.utils.words import counted

PLAIN_ADAPTER = (
    "it is a plain LoRA adapter, which most train on prompts and answers alike; here the base reads every prompt, "
    "which may cost some of what the adapter knows (docs/granularity.md has figures)"
)


class Taken(NamedTuple):
    """What became of an adapter's invocation."""

    problems: list[str]
    """Why this adapter cannot be an expert here; empty: it can."""
    difference: str | None
    """In which way it acts otherwise here than in PEFT; None: in none."""


def invocation_of(config: RouterConfig) -> list[int] | None:
    """What to write into the `alora_invocation_tokens` of an expert's adapter; None: it reads prompts too."""
    return list(config.turns.adapted) if config.per_response else None


def take_invocation(lora: LoraConfig, config: RouterConfig) -> Taken:
    """Take the invocation out of a stock adapter's config, because here the router says which tokens an expert reads.

    Args:
        lora: changed in place: what is left is a plain LoRA.
        config: of the router that the adapter is to serve.
    """
    ids, lora.alora_invocation_tokens = lora.alora_invocation_tokens, None
    if not config.per_response:
        return Taken([] if ids is None else [_without_answers(ids, config)], None)
    if ids is None:
        return Taken([], PLAIN_ADAPTER)
    turns: TurnTokens = config.turns
    start = _place_of(tuple(ids), turns)
    if start is None:
        return Taken([_elsewhere(ids, turns)], None)
    earlier = turns.adapted_from - start
    if not earlier:
        return Taken([], None)
    verb = "is" if earlier == 1 else "are"
    return Taken(
        [],
        f"it acts from its invocation {ids} on, {counted(earlier, 'token')} before an expert does here: the first "
        f"{counted(earlier, 'token')} of an answer's header {verb} read by the base (what that costs is not measured)",
    )


def _place_of(ids: tuple[int, ...], turns: TurnTokens) -> int | None:
    """Where in an answer's header an invocation begins that holds the token at which the answer is recognised."""
    header = turns.opening
    places = range(turns.adapted_from + 1)
    return next((at for at in places if at + len(ids) > turns.adapted_from and header[at : at + len(ids)] == ids), None)


def _without_answers(ids: list[int], config: RouterConfig) -> str:
    return (
        f"alora_invocation_tokens is {ids}: it acts from these tokens on, and with granularity {config.granularity!r} "
        f"an expert acts on every token that it is chosen for; a model with granularity {RESPONSE!r} takes it if its "
        "answers begin with them"
    )


def _elsewhere(ids: list[int], turns: TurnTokens) -> str:
    return (
        f"alora_invocation_tokens is {ids}: it acts from these tokens on, and here an expert acts from token "
        f"{turns.recognised[-1]} on of {list(turns.opening)}, with which an answer begins (RouterConfig.turns); an "
        "invocation must be a part of that header which holds this token"
    )
