"""What happens before, inside and after each forward of the base, so that its tokens are routed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from dylo_moe.base.running import hidden_states
from dylo_moe.base.stack import decoder_layers
from dylo_moe.experts.expert import ExpertPool
from dylo_moe.model.nonfinite import blame_nan
from dylo_moe.routing.cache import (
    Memory,
    RouterCacheLayer,
    cache_among,
    find_router_layer,
    keep_router_layer,
    num_cached_tokens,
)
from dylo_moe.routing.config import SHARED
from dylo_moe.routing.dispatch import Dispatch
from dylo_moe.routing.features import RouterState, causal_sums, read_tokens
from dylo_moe.routing.forward_context import ContextSlot, ForwardContext
from dylo_moe.routing.router import Router, Routing, force_routing, impose, make_dispatch
from dylo_moe.routing.token_masks import prompt_ends, text_starts, token_mask
from dylo_moe.routing.turns import TurnState, decide_answers, find_answers
from dylo_moe.utils.distributed import are_joined
from dylo_moe.utils.per_thread import PerThread
from dylo_moe.utils.words import counted

BASE_PASS_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""What a pass of the base alone takes over of a forward's inputs."""


class NotForced:
    """Stands where `route_to` puts its experts, while the router decides. The class itself is the mark."""


class Prompt(NamedTuple):
    """What `generate` works on while it runs."""

    mask: Tensor
    """[prompts, prompt tokens], 0 on padding."""
    decided: RouterState | None
    """With sequence granularity, what the rows are decided on: total [prompts, hidden], mass [prompts, 1]."""
    forced_from: Tensor | None = None
    """With response granularity inside `route_to`, int64 [prompts]: the first position that is forced; answers that
    begin before it are the router's. None: nothing is forced."""
    drafts: bool = False
    """Whether tokens are drafted one by one and may all be taken back."""


class _Asked(PerThread):
    """What the calls that run in a thread ask of its forwards."""

    def __init__(self) -> None:
        self.forced: Any = NotForced
        self.prompt: Prompt | None = None


class _RouterReached(Exception):
    """Ends a forward that was asked for its routing alone."""


class RoutingHooks:
    """Routes every forward of a base, no matter whether the model, `generate` or a user's own loop calls it.

    Four hooks do it, because Transformers' own code runs between them:

    - before the base: the forward's context begins and keeps the inputs that the router needs; where the router reads
      the last hidden states, the base is run alone first;
    - before the first routed layer: hidden states -> features -> routing -> the dispatch that all routed linears read;
    - before the head: where the loss is computed in chunks, no token enters it, and the context keeps what would have;
    - after the base: the context ends, and weights that made the output NaN are named.

    A caller that wants more than the plain forward describes it in a `ForwardContext`, calls `run` with that, and reads
    the results from it.

    Args:
        base: the base model, with the adapters injected.
        router: decides.
        pool: the experts.
        slot: where the routed linears find the running forward's context.
        needs_token_types: whether the base takes tokens for a prefix, which sees all of itself, unless it is told that
            they are text.
        foreign_state: how the base calls what it keeps between calls, where the router cannot follow that.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        router: Router,
        pool: ExpertPool,
        slot: ContextSlot,
        needs_token_types: bool = False,
        foreign_state: str | None = None,
    ) -> None:
        self.base = base
        self.router = router
        self.pool = pool
        self.slot = slot
        self.needs_token_types = needs_token_types
        self.foreign_state = foreign_state
        self._asked = _Asked()
        _, layers = decoder_layers(base)
        self._num_layers = len(layers)
        self._first_layer = router.config.layer_index(self._num_layers)
        self._handles = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            layers[self._first_layer].register_forward_pre_hook(self._route, with_kwargs=True),
            cast(nn.Module, base.get_output_embeddings()).register_forward_pre_hook(self._before_head),
        ]

    def remove(self) -> None:
        """Leave the base as it was."""
        for handle in self._handles:
            handle.remove()

    def run(self, context: ForwardContext, **inputs: Any) -> Any:
        """Run the base for the forward that `context` describes; returns the base's own output."""
        self.slot.announce(context)
        try:
            return self.base(**inputs)
        finally:
            self.slot.announce(None)

    def read(
        self, *, prompt_lengths: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
    ) -> ForwardContext:
        """Run the base up to the router and no further.

        Args:
            prompt_lengths: int64 [batch], as in the model's forward.
            labels: int64 [batch, seq], likewise.
            inputs: of the base.

        Returns:
            The forward's context: its `routing`, and the `states` that were routed by.
        """
        context = ForwardContext(labels=labels, prompt_lengths=prompt_lengths, ends_at_router=True)
        try:
            self.run(context, **inputs, use_cache=False)
        except _RouterReached:
            return context
        raise RuntimeError(f"{type(self.base).__name__} never ran its layer {self._first_layer}")

    @contextmanager
    def forcing(self, experts: Any) -> Iterator[None]:
        """Route all forwards to these experts, or by the router (`NotForced`), while the context lasts. It nests."""
        before, self._asked.forced = self._asked.forced, experts
        try:
            yield
        finally:
            self._asked.forced = before

    @contextmanager
    def generating(self, prompt: Prompt | None) -> Iterator[None]:
        """Treat all forwards as those of one `generate` on this prompt while the context lasts."""
        before, self._asked.prompt = self._asked.prompt, prompt
        try:
            yield
        finally:
            self._asked.prompt = before

    @property
    def forced(self) -> Any:
        """What `route_to` asks for in this thread: an expert's name, None for the base alone, a list of these, or
        `NotForced`."""
        return self._asked.forced

    @property
    def prompt(self) -> Prompt | None:
        """The prompt of the `generate` that runs in this thread; None outside one."""
        return self._asked.prompt

    # Before the base.

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        context = self.slot.begin()  # first, because `_end` runs whatever happens
        context.forced, context.dense = self.decider(), self.pool.has_nascent
        context.position_ids = kwargs.get("position_ids")
        cache = cache_among(args, kwargs)
        context.num_cached = 0 if cache is None else num_cached_tokens(cache)
        if context.labels is None:
            context.labels = kwargs.get("labels")
        if self.foreign_state is not None:
            if kwargs.get(self.foreign_state) is not None:
                raise ValueError(
                    f"{self.foreign_state} is given, a {type(kwargs[self.foreign_state]).__name__} that the router "
                    "cannot follow; give the whole text instead"
                )
            kwargs = {**kwargs, "use_cache": False}
        if self.router.config.per_response:
            context.input_ids = kwargs.get("input_ids", args[0] if args else None)
            if context.input_ids is None:
                raise ValueError(
                    "granularity='response' finds the answers by the tokens that open and close them, so that it needs "
                    "input_ids; inputs_embeds alone cannot be routed"
                )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            context.attention_mask = mask
            args, kwargs = _keep_texts_apart(mask, args, kwargs)
        elif mask is not None and self.prompt is None:  # `generate` makes a static cache's mask ahead
            kind = f"{mask.dim()}-d tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is a {kind}; the router needs the 2-d one, [batch, tokens], to tell padding from text"
            )
        if self.needs_token_types and kwargs.get("token_type_ids") is None:
            text = next(
                value for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if value is not None
            )
            kwargs = {**kwargs, "token_type_ids": torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)}
        if self.base.training and hasattr(self.base.get_input_embeddings(), "neftune_noise_alpha"):
            raise ValueError("NEFTune's noise would change what the router reads; leave neftune_noise_alpha out")
        if self.router.config.reads_final and context.forced is NotForced and not self._is_decided(cache):
            context.last_hidden = self._base_pass(args, kwargs)
        return args, kwargs

    def decider(self) -> Any:
        """What decides a forward that begins now: as `forced`, where a merged expert counts as asked for."""
        found = dict.fromkeys(name for layer in self.pool.layers for name in layer.merged_adapters)
        if not found:
            return self.forced
        merged = next((name for name in found if name != SHARED), SHARED)  # which is merged beside every expert
        if self.forced is not NotForced and self.forced != merged:
            raise ValueError(f"expert {merged!r} is merged into the base, so nothing else can be routed to; unmerge it")
        return merged

    def _is_decided(self, cache: Cache | None) -> bool:
        """Whether nothing has to be read any more."""
        if self.prompt is not None and self.prompt.decided is not None:
            return True
        memory = None if cache is None else find_router_layer(cache)
        if memory is not None and memory.num_tokens > 0 and memory.decided is None:
            raise ValueError(
                f"this cache's {memory.num_tokens} tokens were not read by the router: with router_layer='final', it "
                "can continue from a cache only with granularity='sequence', and only where the router decided first"
            )
        return memory is not None and memory.decided is not None

    @torch.no_grad()
    def _base_pass(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The base's last hidden states without any expert, [batch, seq, hidden]."""
        inputs = {name: kwargs[name] for name in BASE_PASS_INPUTS if kwargs.get(name) is not None}
        inputs |= dict(zip(("input_ids", "attention_mask"), args, strict=False))
        alone = ForwardContext(skips_head=True)
        alone.attention_mask = inputs.get("attention_mask")
        self.slot.enter(alone)
        try:
            self.base.forward(**inputs, use_cache=False, return_dict=True)  # without the hooks of a forward of its own
        finally:
            self.slot.end()
        return cast(Tensor, alone.head_input)

    # As the first routed layer begins.

    def _route(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hidden states -> features -> routing -> dispatch."""
        context = self.slot.current
        if context is None:
            return
        hidden = cast(Tensor, hidden_states(args, kwargs))
        cache = cache_among(args, kwargs)
        mask = self._mask(context, hidden)
        context.mask, context.num_tokens = mask, mask.numel()
        by_answers = self.router.config.per_response
        decides = context.forced is NotForced or context.ends_at_router or by_answers
        if decides or cache is not None:
            context.states = self._states(context, hidden.detach(), mask, cache)
        context.routing, context.dispatch = self._routing(context, mask)
        if context.ends_at_router:
            raise _RouterReached
        # So that a batch without an answer, or a rank whose tokens chose no expert, has a backward pass.
        trains = self.router.training and torch.is_grad_enabled() and (by_answers or are_joined())
        if trains and not hidden.requires_grad:
            hidden.requires_grad_()

    def _routing(self, context: ForwardContext, mask: Tensor) -> tuple[Routing, Dispatch]:
        """Who computes each token: by the gate, or where `route_to` asks for; of some turns, by both."""
        answers, dtype = context.answers, self.pool.compute_dtype()
        is_exact, routed = answers is not None, mask if answers is None else answers.tokens
        layouts, uses_shared = self.pool.layouts, None
        experts = None
        if context.forced is not NotForced:
            experts = one_per_row(context.forced, mask.shape[0], expandable=self.prompt is not None)
            forced = routed if answers is None else self._forced_tokens(context, routed)
            if answers is None or torch.equal(forced, routed):
                return force_routing(
                    self.router.names, experts, mask=routed, layouts=layouts, dtype=dtype, is_exact=is_exact
                )
        assert context.states is not None
        routing, selected = self.router(context.states, mask=routed, dense=context.dense)
        if experts is not None:
            routing, selected, uses_shared = impose(routing, selected, experts, tokens=forced)
        dispatch = make_dispatch(
            routing, selected, layouts=layouts, dtype=dtype, is_exact=is_exact, uses_shared=uses_shared
        )
        return routing, dispatch

    def _forced_tokens(self, context: ForwardContext, routed: Tensor) -> Tensor:
        """bool [batch, seq]: the answers' tokens that `route_to` is for; in `generate`, none that were read before."""
        if self.prompt is None or self.prompt.forced_from is None:
            return routed
        batch, seq = routed.shape
        position_S = context.num_cached + torch.arange(seq, device=routed.device)
        return routed & (position_S >= _expand_rows(self.prompt.forced_from, batch)[:, None])

    def _mask(self, context: ForwardContext, hidden: Tensor) -> Tensor:
        batch, seq = hidden.shape[:2]
        mask = context.attention_mask
        if mask is None and self.prompt is not None:
            prompt = _expand_rows(self.prompt.mask, batch)
            end = context.num_cached + seq
            mask = torch.cat([prompt, prompt.new_ones(batch, max(end - prompt.shape[1], 0))], 1)[:, :end]
        return token_mask(mask, batch=batch, seq=seq, device=hidden.device)

    @torch.no_grad()
    def _states(self, context: ForwardContext, hidden: Tensor, mask: Tensor, cache: Cache | None) -> RouterState | None:
        memory = None
        if cache is not None:
            memory = find_router_layer(cache) or RouterCacheLayer()
            memory.check_continues(context.num_cached)
            context.memory, context.cache = memory, cache
        if self.router.config.reads_final:
            hidden = context.last_hidden  # type: ignore[assignment]
        if self.router.config.per_sequence:
            return self._sequence_states(context, hidden, mask, memory)
        if hidden is None:  # forced, so that the base was not run alone
            if memory is not None:
                memory.hold(None, num_tokens=mask.shape[1])
            return None
        starts = text_starts(context.position_ids, mask=mask)
        tokens = read_tokens(hidden, mask=mask)
        before = None if memory is None else memory.state
        after: Memory
        if self.router.config.per_response:
            after = self._turn_states(context, tokens, mask, starts, cast("TurnState | None", before))
        else:
            after = self._token_states(tokens, mask, starts, cast("RouterState | None", before))
        context.remembered = after
        if memory is not None:
            memory.store(after, all_of_them=self.prompt is not None and self.prompt.drafts)
        return after.decided if isinstance(after, TurnState) else after

    def _token_states(
        self, tokens: Tensor, mask: Tensor, starts: Tensor | None, before: RouterState | None
    ) -> RouterState:
        """The state after each token."""
        half_life = self.router.config.router_half_life
        states = causal_sums(tokens, mask=mask, half_life=half_life, state=before, starts=starts)
        belief = None if before is None else before.belief
        return states._replace(belief=self.router.believe(tokens, mask=mask, belief=belief, starts=starts))

    def _turn_states(
        self, context: ForwardContext, tokens: Tensor, mask: Tensor, starts: Tensor | None, before: TurnState | None
    ) -> TurnState:
        """The state after each token, and where an answer is open, the one with which it began."""
        config, ids = self.router.config, cast(Tensor, context.input_ids).to(mask.device)
        recent, is_open, read = (None, None, None) if before is None else (before.recent, before.is_open, before.read)
        context.answers = find_answers(
            ids, mask=mask, turns=config.turns, starts=starts, recent=recent, is_open=is_open
        )
        states = causal_sums(tokens, mask=mask, half_life=config.router_half_life, state=read, starts=starts)
        return decide_answers(states, context.answers, before=before)

    def _sequence_states(
        self, context: ForwardContext, hidden: Tensor | None, mask: Tensor, memory: RouterCacheLayer | None
    ) -> RouterState | None:
        """The state after each text's last prompt token, at all of its tokens."""
        batch, seq = mask.shape
        decided = None if memory is None else memory.decided
        if decided is None and self.prompt is not None and self.prompt.decided is not None:
            decided = self.prompt.decided.each(lambda part: _expand_rows(part, batch))
        states = None
        if decided is not None:
            if context.prompt_lengths is not None:
                raise ValueError("prompt_lengths came too late: the rows of this cache are decided; leave it out")
            states = decided.each(lambda part: part[:, None].expand(batch, seq, -1))
        elif hidden is not None:
            starts = text_starts(context.position_ids, mask=mask)
            half_life = self.router.config.router_half_life
            states = causal_sums(read_tokens(hidden, mask=mask), mask=mask, half_life=half_life, starts=starts)
            ends = prompt_ends(mask, starts=starts, prompt_lengths=context.prompt_lengths, labels=context.labels)
            states = states.each(lambda part: part.gather(1, ends[..., None].expand_as(part)))
            decided = states.last
        if memory is not None:
            memory.hold(decided, num_tokens=seq)
        return states

    # As the head begins, and after the base.

    def _before_head(self, head: nn.Module, args: tuple) -> tuple | None:
        """Keep what would enter a head that is skipped, and let no token through."""
        context = self.slot.current
        if context is None or not context.skips_head:
            return None
        context.head_input = args[0]
        return (args[0][:, :0], *args[1:])

    def _end(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        context = self.slot.end()
        if context.cache is not None and context.memory is not None:
            keep_router_layer(context.cache, context.memory, num_layers=self._num_layers)
        if not isinstance(output, ModelOutput):
            return
        if context.skips_head:
            if context.head_input is None:
                raise ValueError(
                    "the base has another output head than when this model was made, so that no loss can be computed "
                    "in chunks; set loss_chunk_size to None, or make a new model on this base"
                )
            return
        logits = output.get("logits")
        if logits is not None and context.routing is not None:  # None where a draft ends before the router's layer
            lost = logits[..., 0].isnan()  # a token whose hidden state is NaN
            # One entry of a row: NaN in the head itself.
            lost = lost | (logits[:, -1:].isnan().any(-1) & ~lost[:, -1:])
            blame_nan(context.routing, lost, mask=context.mask, base=self.base, pool=self.pool, router=self.router)


def _keep_texts_apart(mask: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The base's inputs where packed rows are padded.

    Transformers separates packed texts by their positions, but only where no mask is given. Without one, a padding
    token is kept from the texts by a position of its own: 0, as a text of one token.
    """
    positions = kwargs.get("position_ids")
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is not False:
        return args, kwargs
    starts = text_starts(positions, mask=mask.bool())
    if positions is None or starts is None or not (torch.compiler.is_compiling() or starts.any()):
        return args, kwargs
    if len(args) > 1:
        args = (args[0], None, *args[2:])
    else:
        kwargs = {**kwargs, "attention_mask": None}
    return args, {**kwargs, "position_ids": positions.masked_fill(mask == 0, 0)}


def one_per_row(forced: Any, batch: int, *, expandable: bool) -> list[str | None]:
    """One expert (None: the base alone) for each row of a batch, from what `route_to` was given.

    Args:
        expandable: rows may stand for several of a shorter list each, as `generate` repeats them.

    Raises:
        ValueError: for a list of another length.
    """
    if forced is None or isinstance(forced, str):
        return [forced] * batch
    if len(forced) == batch:
        return list(forced)
    if expandable and batch % len(forced) == 0:
        return [name for name in forced for _ in range(batch // len(forced))]
    raise ValueError(f"route_to was given {counted(len(forced), 'expert')} for a batch of {batch}; give one per row")


def _expand_rows(tensor: Tensor, batch: int) -> Tensor:
    """The rows of prompts for the rows that `generate` made of each."""
    return tensor.repeat_interleave(batch // tensor.shape[0], 0)
