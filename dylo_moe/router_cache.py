"""The router's memory as one more layer of a Transformers cache, so that it follows the cache.

Beam search reorders a cache, sampling several answers repeats it; a memory that lives in the same
object goes through the same calls.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DummyLayer, StaticLayer

from .router import RouterState


class RouterCacheLayer(DummyLayer):
    """Holds a `RouterState` for each row, and how many tokens it has seen.

    To Transformers it is one of the layers that hold no keys and values, and it is passed over as those are.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: RouterState | None = None
        self.num_tokens = 0

    def continue_at(self, num_tokens: int) -> RouterState | None:
        """The state to go on from.

        Raises:
            ValueError: when the rest of the cache holds another number of tokens than this memory saw.
        """
        if num_tokens != self.num_tokens:
            raise ValueError(
                f"the cache holds {num_tokens} tokens, but the router has seen {self.num_tokens} of them; "
                "pass a cache that this model filled from its first token"
            )
        return self.state

    def store(self, state: RouterState, *, num_tokens: int) -> None:
        """Take the state after `num_tokens` more tokens (padding counted)."""
        self.state = state
        self.num_tokens += num_tokens

    def _select(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = RouterState(*(part.index_select(0, index.to(part.device)) for part in self.state))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            self.state = RouterState(*(part.repeat_interleave(repeats, 0) for part in self.state))

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.num_tokens = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused unless there is nothing to remove: a running mean cannot be unsummed."""
        if tokens_to_remove:
            raise ValueError("a routed model's cache cannot be cropped: the router's running mean cannot be unsummed")


def router_cache_layer(cache: Cache, *, num_layers: int) -> RouterCacheLayer:
    """The router's layer of a cache, appended behind those of the base's `num_layers` where it is new.

    Raises:
        ValueError: for a static cache.
    """
    for layer in reversed(cache.layers):
        if isinstance(layer, RouterCacheLayer):
            return layer
        if isinstance(layer, StaticLayer):
            raise ValueError("a static cache has no room for the router's memory; use a dynamic one (the default)")
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    memory = RouterCacheLayer()
    cache.layers.append(memory)
    return memory
