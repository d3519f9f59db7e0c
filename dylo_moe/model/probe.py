"""What a base gives to its linears, its layers and its cache, seen by running it on a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from dylo_moe.base.frozen import switch_off_dropout
from dylo_moe.base.limits import context_of
from dylo_moe.base.running import hidden_states, modes_of, plain_ids
from dylo_moe.base.stack import decoder_layers
from dylo_moe.experts.targets import layer_linears
from dylo_moe.routing.cache import RouterCacheLayer, cache_among, keep_router_layer
from dylo_moe.routing.config import RouterConfig

ROWS, TOKENS = 2, 3
"""The shape of the batch that a base is run on."""

CHANGED = TOKENS - 1
"""The place, over all rows, of the token that is exchanged: the last of the first row. In a layout with the tokens
first it would be another."""

LONG = 67
"""The tokens of a longer text: a prime, because some bases pad a text to a multiple of their chunks (Reformer)."""

STATES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""How models of Transformers call what they keep between calls."""


class Probe(NamedTuple):
    """What is to know of a base before experts are put on it."""

    router_index: int
    """The first layer that may carry experts; the routing is known as it begins."""
    hidden_size: int
    """The width of the hidden states that the router reads."""
    needs_token_types: bool
    """Whether tokens see later ones unless `token_type_ids` of 1 say that they are no part of a prefix (PaliGemma)."""
    foreign_state: str | None
    """How the base calls what it keeps between calls, where that is no `Cache` which the router's memory could join."""
    misfed: dict[str, str]
    """The linears that are not fed the tokens of a forward, each once and in their order, with what they are fed."""


def probe(base: PreTrainedModel, *, router: RouterConfig) -> Probe:
    """Run a base on six tokens, once whole, once with another token, and once in two steps with a cache.

    Its own dropout is switched off for good, and nothing else changes. On the meta device only shapes are seen, and a
    base that cannot run there is taken for one that feeds all of its linears.

    Args:
        base: the plain base, without adapters.
        router: where it reads.

    Raises:
        ValueError: for a base that no router could follow: one that cannot run on tokens alone, that lets a token
            change what is computed of earlier ones, whose layers pass on something else than [batch, tokens, hidden],
            or whose cache does not take the router's memory.
    """
    switch_off_dropout(base)  # and what would repack 4-bit weights in the first forward
    return _Probing(base, router).run()


class _LayerReached(Exception):
    """Ends a forward at the router's layer."""


class _Probing:
    """One run of `probe`: the base, and what the hooks on it saw of its last forward."""

    def __init__(self, base: PreTrainedModel, router: RouterConfig) -> None:
        self.base = base
        self.kind = type(base).__name__
        self.on_meta = base.device.type == "meta"
        self.router = router
        _, layers = decoder_layers(base)
        self.num_layers = len(layers)
        self.router_index = router.layer_index(self.num_layers)
        self.layer = layers[self.router_index]
        self.linears = {name: base.get_submodule(name) for name in layer_linears(base)}
        self.fed: dict[str, list[Tensor]] = {}
        self.entering: Tensor | None = None
        self.entries = 0
        self.head_input: Tensor | None = None
        self.cache: Cache | None = None
        self.with_types = False
        self.ends_at_layer = False
        self.foreign_state: str | None = None

    def run(self) -> Probe:
        with torch.no_grad(), modes_of(self.base), self._watched():
            self.base.eval()
            try:
                ids = plain_ids(self.base, ROWS * TOKENS + 1)
                whole, other = ids[:-1].reshape(ROWS, TOKENS), ids[:-1].clone()
                other[CHANGED] = ids[-1]
                logits = self._forward(whole).logits
            except Exception as error:  # of any model code
                if self.on_meta:
                    return Probe(self.router_index, self.base.config.get_text_config().hidden_size, False, None, {})
                raise ValueError(f"{self.kind} cannot run on tokens alone: {_in_words(error)}") from error
            hidden_size = self._hidden_size()
            misfed = self._misfed(*self._with_one_changed(whole, other.reshape(ROWS, TOKENS), logits))
            self._check_long()
            misfed = self._misfed_with_cache(whole) | misfed
        in_order = {name: misfed[name] for name in self.linears if name in misfed}
        return Probe(self.router_index, hidden_size, self.with_types, self.foreign_state, in_order)

    def _forward(self, ids: Tensor, **inputs: Any) -> Any:
        """A forward of the base that keeps a cache."""
        self.fed, self.entering, self.entries, self.head_input, self.cache = {}, None, 0, None, None
        if self.with_types:
            inputs["token_type_ids"] = torch.ones_like(ids)
        return self.base(input_ids=ids, use_cache=True, return_dict=True, **inputs)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Keep what the linears, the router's layer and the head are given while the context lasts."""

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args: self.fed.setdefault(name, []).append(args[0].detach())

        handles = [linear.register_forward_pre_hook(keep(name)) for name, linear in self.linears.items()]
        handles.append(self.layer.register_forward_pre_hook(self._at_layer, with_kwargs=True))
        handles.append(self.base.get_output_embeddings().register_forward_pre_hook(self._at_head))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _at_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.entering, self.entries = hidden_states(args, kwargs), self.entries + 1
        self.cache = cache_among(args, kwargs)
        if self.ends_at_layer:
            raise _LayerReached

    def _at_head(self, head: nn.Module, args: tuple) -> None:
        self.head_input = args[0]

    def _hidden_size(self) -> int:
        hidden = self.head_input if self.router.reads_final else self.entering
        place = "its head" if self.router.reads_final else f"its layer {self.router_index}"
        shape = "nothing" if hidden is None else list(hidden.shape)
        if hidden is None or hidden.dim() != 3 or hidden.shape[:2] != (ROWS, TOKENS):
            raise ValueError(
                f"{self.kind} gives {shape} to {place} for {ROWS} rows of {TOKENS} tokens; a router reads hidden "
                "states [batch, tokens, hidden]"
            )
        if self.entries > 1:
            raise ValueError(
                f"{self.kind} runs tokens through its layers repeatedly; experts are routed along layers that run once"
            )
        return hidden.shape[-1]

    def _check_long(self) -> None:
        """Refuse a base whose layers are given more or fewer tokens than a longer text has."""
        num_tokens = min(LONG, context_of(self.base) or LONG)
        ids = plain_ids(self.base, num_tokens)
        self.ends_at_layer, hidden = True, None
        try:
            self._forward(ids[None])
        except _LayerReached:
            hidden = self.entering
        except Exception as error:  # of any model code
            if self.on_meta:
                return
            raise ValueError(f"{self.kind} cannot run on {num_tokens} tokens: {_in_words(error)}") from error
        finally:
            self.ends_at_layer = False
        if hidden is None or hidden.shape[1] != num_tokens:
            shape = "nothing" if hidden is None else list(hidden.shape)
            raise ValueError(
                f"{self.kind} gives {shape} to its layer {self.router_index} for a text of {num_tokens} tokens; a "
                "router reads hidden states [batch, tokens, hidden]"
            )

    def _with_one_changed(
        self, ids: Tensor, other: Tensor, logits: Tensor
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        """What the linears are fed of a text, which was the last that the base read and gave these logits, and of the
        same with another token, which no other place may notice."""
        fed, changed = self.fed, self._forward(other).logits
        if self.on_meta or not _changed_places(logits, changed) - {CHANGED}:
            return fed, self.fed
        has_prefix = getattr(self.base.config.get_text_config(), "use_bidirectional_attention", False)
        if has_prefix and not self.with_types and "token_type_ids" in inspect.signature(self.base.forward).parameters:
            self.with_types = True
            return self._with_one_changed(ids, other, self._forward(ids).logits)
        raise ValueError(
            f"{self.kind} lets a token change what it computes of earlier ones or of other rows, so that it is no "
            "causal language model"
        )

    def _misfed(self, fed: dict[str, list[Tensor]], changed: dict[str, list[Tensor]]) -> dict[str, str]:
        """The linears that are not fed all tokens of a forward in their order, by what two forwards gave them."""
        found = {}
        for name in self.linears:
            if name not in fed:
                found[name] = "is not called for a short text"
            elif count := _other_count(fed[name], ROWS * TOKENS):
                found[name] = f"is fed {count} tokens in a forward of {ROWS * TOKENS}"
            elif not self.on_meta and any(
                _changed_places(before, after) - {CHANGED}
                for before, after in zip(fed[name], changed[name], strict=False)
            ):
                found[name] = "is fed the tokens of a forward in another order, or several at once"
        return found

    def _misfed_with_cache(self, ids: Tensor) -> dict[str, str]:
        """The linears that are fed cached tokens too, if the base keeps a cache that the router can follow."""
        try:
            out = self._forward(ids[:, :-1])
            name = next((name for name in STATES if out.get(name) is not None), STATES[0])
            if self.cache is None:
                self.foreign_state = name if name in out else None
                return {}
            keep_router_layer(self.cache, RouterCacheLayer(), num_layers=self.num_layers)
            self._forward(ids[:, -1:], **{name: self.cache})  # RecurrentGemma does not return it
        except Exception as error:  # of any model code
            if self.on_meta:
                return {}
            what = "cannot read a text in two steps"
            if self.cache is not None:
                what += f" with the router's memory in its {type(self.cache).__name__}"
            raise ValueError(f"{self.kind} {what}: {_in_words(error)}") from error
        counts = {name: _other_count(calls, ROWS) for name, calls in self.fed.items()}
        return {
            name: f"is fed cached tokens too, {count} in a forward of {ROWS}" for name, count in counts.items() if count
        }


def _num_tokens(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _other_count(calls: list[Tensor], count: int) -> int | None:
    """How many tokens a linear is fed in the first of these calls that is not fed `count` of them."""
    return next((found for found in map(_num_tokens, calls) if found != count), None)


def _changed_places(before: Tensor, after: Tensor) -> set[int]:
    """The tokens whose values differ between two forwards, by more than rounding can make of the largest difference."""
    if before.shape != after.shape:
        return set(range(_num_tokens(before)))
    difference = (before.float() - after.float()).abs().flatten(0, -2).amax(-1)
    rounding = torch.finfo(before.dtype).eps ** 0.5
    return set((difference > rounding * difference.max()).nonzero().flatten().tolist())


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
