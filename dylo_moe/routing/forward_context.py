"""One forward of the model, as an object: its request, its state, and its results.

It is the only thing that a model, the hooks on its base and its routed linears share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from dylo_moe.routing.cache import Memory, RouterCacheLayer
from dylo_moe.routing.dispatch import Dispatch
from dylo_moe.routing.features import RouterState
from dylo_moe.routing.turns import Answers
from dylo_moe.utils.per_thread import PerThread


class ForwardContext:
    """One forward of the model. Its caller states what it wants, the hooks fill in the rest, the caller reads it.

    It exists as long as that forward and its caller keep it; gradient checkpointing keeps it for the recomputation.

    Args:
        labels: int64 [batch, seq], from which the router may see where prompts end; the base need not get them.
        prompt_lengths: int64 [batch], in real tokens.
        skips_head: the base computes no logits; what would enter its head is in `head_input` instead.
        ends_at_router: the forward ends when the routing is known.
    """

    def __init__(
        self,
        *,
        labels: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        skips_head: bool = False,
        ends_at_router: bool = False,
    ) -> None:
        self.labels = labels
        self.prompt_lengths = prompt_lengths
        self.skips_head = skips_head
        self.ends_at_router = ends_at_router
        # What is known as the base begins.
        self.forced: Any = None
        """What `route_to` asks for, in the terms of `RoutingHooks`."""
        self.dense = False
        """Whether some expert is nascent; kept, because an older Transformers recomputes the routing too."""
        self.input_ids: Tensor | None = None
        """[batch, seq], where the router finds answers by their tokens."""
        self.attention_mask: Tensor | None = None
        """[batch, tokens], cached ones included."""
        self.position_ids: Tensor | None = None
        """[batch, seq]; where they start over, another text begins."""
        self.num_cached = 0
        """The number of tokens in the cache as the base begins, padding counted."""
        self.last_hidden: Tensor | None = None
        """[batch, seq, hidden] of a pass of the base alone, where the router reads those."""
        # The router's results.
        self.cache: Cache | None = None
        """The cache that the layers were given."""
        self.memory: RouterCacheLayer | None = None
        """The router's layer of it, which joins a new cache when the base has ended: some count their layers."""
        self.states: RouterState | None = None
        """What each token is routed by: the router's memory after it, with sequence granularity after its prompt, with
        response granularity as its answer began."""
        self.remembered: Memory | None = None
        """What a cache keeps after each token; None with sequence granularity, which keeps the decision alone."""
        self.answers: Answers | None = None
        """With response granularity, the answers among the tokens."""
        self.routing: Any = None
        """A `Routing`: which experts each token uses, with which weights."""
        self.dispatch: Dispatch | None = None
        """The routing, in the layout that the routed linears read."""
        self.num_tokens = 0
        """The number of tokens that it is for, padding counted."""
        self.mask: Any = None
        """bool [batch, seq]: which of them are real; with response granularity not all of these are routed."""
        # What the base leaves for its caller.
        self.head_input: Tensor | None = None
        """[batch, seq, hidden], where the head was skipped."""
        self.outer: ForwardContext | None = None
        """The forward inside which this one runs, if any."""


class ContextSlot(PerThread):
    """Holds the context of the forward that is running, for a model and all its routed linears.

    Each thread has its own, so that several can run one model at once. A backward pass that recomputes activations may
    run in yet another thread: `checkpoint_contexts` takes the context there.
    """

    def __init__(self) -> None:
        self.current: ForwardContext | None = None
        self._announced: ForwardContext | None = None

    def announce(self, context: ForwardContext | None) -> None:
        """The next forward of the base is the one that `context` describes; None: nothing is announced."""
        self._announced = context

    def begin(self) -> ForwardContext:
        """A forward of the base starts; returns its context, a new one where none was announced."""
        context, self._announced = self._announced or ForwardContext(), None
        self.enter(context)
        return context

    def enter(self, context: ForwardContext) -> None:
        """`context` is of the forward that runs from here on, until `end`."""
        context.outer, self.current = self.current, context

    def end(self) -> ForwardContext:
        """The running forward has returned or raised; returns its context."""
        context = self.current
        assert context is not None
        self.current = context.outer
        return context

    @contextmanager
    def _restored(self, context: ForwardContext | None) -> Iterator[None]:
        before, self.current = self.current, context
        try:
            yield
        finally:
            self.current = before

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The `context_fn` of `torch.utils.checkpoint`: what is recomputed reads its own forward's dispatch."""
        return nullcontext(), self._restored(self.current)

    def dispatch(self, *, num_tokens: int) -> Dispatch:
        """The running forward's dispatch, for a linear that is fed `num_tokens` tokens.

        Raises:
            RuntimeError: outside a forward of the whole model, before its router has run, or for another number of
                tokens than were routed.
        """
        if self.current is None or self.current.dispatch is None:
            raise RuntimeError(
                "a routed linear was called outside a forward of its DyLoRAMoE model, so it is not decided which "
                "experts its tokens use; call the whole model. If this came from gradient checkpointing, switch it "
                "on with model.gradient_checkpointing_enable() of the DyLoRAMoE model, not of the base in it"
            )
        if num_tokens != self.current.num_tokens and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"a routed linear is fed {num_tokens} tokens in a forward of {self.current.num_tokens}, so that it is "
                "not known which experts they use: leave this linear out of the experts' target_modules"
            )
        return self.current.dispatch
