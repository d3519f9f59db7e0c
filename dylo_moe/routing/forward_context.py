"""Whose forward is running, and what it knows about itself: the one thing that a model and its routed linears share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from dylo_moe.routing.dispatch import Dispatch


class ForwardContext:
    """What one forward of the model knows about itself; it lives exactly as long as that forward.

    Gradient checkpointing holds on to it and puts it back while it recomputes.

    Args:
        forced: what `route_to` asked for when the forward began, in `RoutingHooks`' terms.
        dense: whether some expert was nascent then; an older Transformers recomputes the routing too.
        attention_mask: [batch, tokens] as the forward was given it.
        position_ids: [batch, seq] likewise; where they start over, another text begins.
        prompt_lengths: int64 [batch] likewise.
        labels: int64 [batch, seq] likewise.
        ends_at_router: nothing is asked for but the routing.
    """

    def __init__(
        self,
        forced: Any,
        *,
        dense: bool = False,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        ends_at_router: bool = False,
    ) -> None:
        self.forced = forced
        self.dense = dense
        self.attention_mask = attention_mask
        self.position_ids = position_ids
        self.prompt_lengths = prompt_lengths
        self.labels = labels
        self.ends_at_router = ends_at_router
        self.last_hidden: Tensor | None = None
        """[batch, seq, hidden] of a pass of the base alone, where the router reads those."""
        self.features: Tensor | None = None
        self.states: Any = None
        """The router's memory after each token."""
        self.routing: Any = None
        self.dispatch: Dispatch | None = None
        self.outer: ForwardContext | None = None


class ContextSlot:
    """The one object that a model and all its routed linears share: whose forward is running."""

    def __init__(self) -> None:
        self.current: ForwardContext | None = None

    def begin(self, context: ForwardContext) -> None:
        """A forward starts."""
        context.outer, self.current = self.current, context

    def end(self) -> ForwardContext:
        """The running forward is over, well or badly; returns its context."""
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
        """`context_fn` of `torch.utils.checkpoint`: what is recomputed reads its own forward's dispatch."""
        return nullcontext(), self._restored(self.current)

    def dispatch(self) -> Dispatch:
        """The running forward's dispatch.

        Raises:
            RuntimeError: outside a forward of the whole model, or before its router has run.
        """
        if self.current is None or self.current.dispatch is None:
            raise RuntimeError(
                "a routed linear was called outside a forward of its DyLoRAMoE model, so nobody has decided which "
                "experts its tokens use; call the whole model. If this came from gradient checkpointing, switch it "
                "on with model.gradient_checkpointing_enable() of the DyLoRAMoE model, not of the base in it"
            )
        return self.current.dispatch
