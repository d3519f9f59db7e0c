"""The router's memory as one more layer of a Transformers cache, so that it follows the cache.

Beam search reorders a cache, sampling several answers repeats it, assisted decoding takes back what a
draft got wrong; a memory that lives in the same object goes through the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache, cache_utils
from transformers.cache_utils import CacheLayerMixin

from dylo_moe.routing.features import RouterState
from dylo_moe.routing.turns import TurnState
from dylo_moe.utils.words import counted

HISTORY = 128
"""The number of tokens before the last call that can be removed again; those of the last call always can."""

Memory = RouterState | TurnState
"""What the router carries from token to token: `TurnState` where it decides once an answer."""

DummyLayer: Any = getattr(cache_utils, "DummyLayer", object)
"""Transformers' own layer that holds no keys and values; it has one since 5.23."""


class RouterCacheLayer(DummyLayer):
    """What the router remembers of each row, and how many tokens it has seen.

    With token granularity that is the causal mean's state after each of the last tokens, because a running
    mean cannot be unsummed; with response granularity also which answer is open, and what it was decided on;
    with sequence granularity, the features on which the row was decided. To Transformers it is one of the
    layers that hold no keys and values, and it is passed over as those are.
    """

    is_compileable = True  # as static layers are: Transformers masks by it what they have not filled yet
    is_croppable = True
    supports_early_init = False
    is_sliding = None
    """Neither: before 5.23 masks are measured at the first layer that slides, or that does not; never at this one."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = self.values = None
        self.is_initialized = True
        self.num_tokens = 0
        self.decided: RouterState | None = None
        """What the routing of the whole row was decided on: total [batch, hidden], mass [batch, 1]."""
        self._history: list[Memory] = []

    def check_continues(self, num_tokens: int) -> None:
        """Raises ValueError when the rest of the cache holds another number of tokens than this memory saw."""
        if num_tokens != self.num_tokens:
            raise ValueError(
                f"the cache holds {counted(num_tokens, 'token')}, but the router has seen {self.num_tokens} of them; "
                "pass a cache that this model filled from its first token"
            )

    @property
    def state(self) -> Memory | None:
        """The memory after the last token, without the dimension of the tokens. None when nothing was seen yet."""
        return self._history[-1].last if self._history else None

    def store(self, states: Memory, *, all_of_them: bool = False) -> None:
        """Remember some more tokens (padding counted).

        Args:
            states: after each of them: total [batch, seq, hidden], mass [batch, seq, 1].
            all_of_them: drop none, because a draft may be taken back that was made token by token.
        """
        self._history.append(states)
        self.num_tokens += _length(states)
        if all_of_them:
            return
        excess = sum(map(_length, self._history[:-1])) - HISTORY - 1  # with the state before the earliest of them
        while excess > 0:
            oldest = self._history.pop(0)
            if _length(oldest) > excess:  # a copy, so that the rest of a long prompt is let go
                self._history.insert(0, oldest.span(excess, None).each(Tensor.clone))
            excess -= _length(oldest)

    def replace(self, states: Memory) -> None:
        """Remember other states than were stored, for the same tokens."""
        self._history = [states.span(0, self.num_tokens)]

    def hold(self, decided: RouterState | None, *, num_tokens: int) -> None:
        """Keep what the rows were decided on; `num_tokens` more tokens went by."""
        self.decided = decided
        self.num_tokens += num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens.

        Args:
            tokens_to_remove: 0 or less, as in Transformers.

        Raises:
            ValueError: for more than are remembered.
        """
        count = abs(tokens_to_remove)
        if count >= self.num_tokens:
            return self.reset()
        if self._history:
            remembered = sum(map(_length, self._history))
            if count >= remembered:
                raise ValueError(
                    f"{counted(count, 'token')} cannot be taken back from this cache: a running mean cannot be "
                    f"unsummed, and the router remembers how it stood {counted(remembered - 1, 'token')} ago, not "
                    "before; fill a new cache"
                )
            removed = count
            while removed > 0:
                last = self._history.pop()
                if _length(last) > removed:
                    self._history.append(last.span(0, -removed))
                removed -= _length(last)
        self.num_tokens -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beam search. Earlier tokens can then no longer be cropped, which beams never do."""
        self._history = [states.span(-1, None) for states in self._history[-1:]]
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows."""
        self._change_rows(lambda part: part.index_select(0, indices.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row several times."""
        self._change_rows(lambda part: part.repeat_interleave(repeats, 0))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._history = [states.each(change) for states in self._history]
        self.decided = None if self.decided is None else self.decided.each(change)

    def get_max_length(self) -> int:
        """The most tokens that the layer can hold; -1 is unbounded."""
        return -1

    def offload(self) -> None:
        """Do nothing: the memory is small, and stays on its device."""

    def prefetch(self) -> None:
        """Do nothing; see `offload`."""

    def reset(self) -> None:
        """Forget everything."""
        self._history, self.decided, self.num_tokens = [], None, 0


def _length(states: Memory) -> int:
    return states.mass.shape[1]


def cache_among(args: tuple, kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a module's arguments, whatever its family calls it."""
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)


def find_router_layer(cache: Cache) -> RouterCacheLayer | None:
    """The router's layer of a cache; None where this cache has none yet."""
    return next((layer for layer in reversed(_of_decoder(cache).layers) if isinstance(layer, RouterCacheLayer)), None)


def _of_decoder(cache: Cache) -> Cache:
    """The part of a cache that holds the tokens read so far: BERT and its like keep another one for an encoder."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def num_cached_tokens(cache: Cache) -> int:
    """The number of tokens that a cache holds, padding counted. It is asked before a forward adds its own.

    Layers that are recurrent do not count them; of a cache that has no others, the router's memory knows.

    Raises:
        ValueError: where nothing counted the tokens that such layers have read.
    """
    cache = _of_decoder(cache)
    counting = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    if counting:  # MiniMax has empty ones where it is recurrent
        return next((count for count in (int(layer.get_seq_length()) for layer in counting) if count), 0)
    memory = find_router_layer(cache)
    seen = 0 if memory is None else memory.num_tokens
    if cache.layers and not seen and cache.has_previous_state():
        raise ValueError(
            "the cache holds tokens, but the router has seen none of them; pass a cache that this model filled from "
            "its first token"
        )
    return seen


def keep_router_layer(cache: Cache, memory: RouterCacheLayer, *, num_layers: int) -> None:
    """Put the router's layer into a cache that does not have it yet, behind those of the base's `num_layers`."""
    if find_router_layer(cache) is not None:
        return
    cache = _of_decoder(cache)
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    cache.layers.append(memory)
