"""One call of `generate`: its arguments, the features by which its rows are routed, and the routing of its output."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, GenerationConfig

from dylo_moe.base.limits import limits_of
from dylo_moe.model.routing_hooks import NotForced, Prompt, RoutingHooks, one_per_row
from dylo_moe.routing.cache import find_router_layer
from dylo_moe.routing.features import RouterState
from dylo_moe.routing.router import Routing
from dylo_moe.routing.token_masks import as_list, finished_mask, prompt_mask
from dylo_moe.routing.turns import TurnState, find_answers, list_turns
from dylo_moe.utils.errors import DyLoRAWarning


class GenerateCall:
    """The arguments of one `generate`, and what of them the routing needs to know.

    Args:
        args: positional: the prompt's ids, a generation config.
        kwargs: all others; `keywords` holds them as they are to be passed on.
        defaults: the model's own generation config.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], *, defaults: GenerationConfig) -> None:
        self._configs = [args[1] if len(args) > 1 else kwargs.get("generation_config"), defaults]
        self.keywords = {**kwargs, "disable_compile": True}  # which Transformers would do to a static cache on a GPU
        self.input_ids: Tensor | None = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        self.inputs_embeds: Tensor | None = kwargs.get("inputs_embeds")
        self.position_ids: Tensor | None = kwargs.get("position_ids")
        self.cache: Cache | None = kwargs.get("past_key_values", kwargs.get("cache_params"))
        self.ends = as_list(self.value("eos_token_id"))
        self.mask = self._mask()
        """[prompts, prompt tokens], 0 on padding; None if there is no prompt at all."""
        if self.mask is not None:
            self.keywords["attention_mask"] = self.mask

    def value(self, name: str) -> Any:
        """An option as Transformers resolves it: the keyword, else the config passed, else the model's own."""
        values = [self.keywords.get(name), *(getattr(config, name, None) for config in self._configs)]
        return next((value for value in values if value is not None), None)

    def _mask(self) -> Tensor | None:
        mask = self.keywords.get("attention_mask")
        if mask is None and self.input_ids is not None:
            return prompt_mask(self.input_ids, pad=self.value("pad_token_id"), ends=self.ends)
        if mask is None and self.inputs_embeds is not None:
            return torch.ones(self.inputs_embeds.shape[:2], dtype=torch.int64, device=self.inputs_embeds.device)
        return mask

    def check(self, hooks: RoutingHooks) -> None:
        """Raise ValueError for a kind of decoding that this router does not allow."""
        config, forced = hooks.router.config, hooks.decider()
        if config.reads_final and not config.per_sequence and forced is NotForced:
            raise ValueError(
                "router_layer='final' with granularity='token' cannot generate: the router would have to read every "
                "new token in a second pass of the base alone; use granularity='sequence', or generate inside route_to"
            )
        if self.value("compile_config") is not None:
            raise ValueError("compile_config is given, but decoding of a routed model cannot be compiled yet")
        if self.mask is not None and isinstance(forced, (list, tuple)):
            one_per_row(forced, self.mask.shape[0], expandable=False)

    def leave_foreign_state(self, hooks: RoutingHooks) -> None:
        """Do without what the base keeps between calls, where the router cannot follow that, and say so."""
        if hooks.foreign_state is None:
            return
        if self.value("use_cache") is not False:
            warnings.warn(
                f"{type(hooks.base).__name__} keeps its {hooks.foreign_state} in a way that the router cannot follow, "
                "so that the whole text is read again for every new token",
                DyLoRAWarning,
                stacklevel=4,
            )
        self.keywords["use_cache"] = False

    def prompt(self, hooks: RoutingHooks) -> Prompt | None:
        """The facts that the forwards of this call need; None if there is no prompt."""
        if self.mask is None:
            return None
        config = hooks.router.config
        decided = None
        if config.per_sequence and not (config.reads_final and hooks.decider() is not NotForced):
            decided = self._decide(hooks, self.mask)
        forced_from = None
        if config.per_response and hooks.decider() is not NotForced:
            forced_from = self._forced_from(hooks, self.mask)
        drafts = self.value("is_assistant") or self.value("assistant_early_exit") is not None
        return Prompt(self.mask, decided, forced_from, drafts=bool(drafts))

    def _forced_from(self, hooks: RoutingHooks, mask: Tensor) -> Tensor:
        """int64 [prompts]: where the answer begins that is open at the prompt's end, and is to be written by whom
        `route_to` asks for; what a cache holds, or where none is open the whole prompt, was read already."""
        turns, ids = hooks.router.config.turns, cast(Tensor, self.input_ids)
        num_before = mask.shape[1] - ids.shape[1]  # which are in the cache alone
        memory = None if self.cache is None else find_router_layer(self.cache)
        state = cast("TurnState | None", memory.state) if memory is not None and num_before > 0 else None
        recent, is_open = (None, None) if state is None else (state.recent, state.is_open)
        answers = find_answers(ids, mask=mask[:, num_before:].bool(), turns=turns, recent=recent, is_open=is_open)
        begins = answers.opened_at[:, -1].clamp_min(0) + num_before
        begins = torch.where(answers.is_open[:, -1], begins, mask.shape[1])
        return begins.clamp_min(0 if memory is None else memory.num_tokens)

    def _decide(self, hooks: RoutingHooks, mask: Tensor) -> RouterState:
        """What each prompt's row is routed by, total [prompts, hidden]: from its cache, or from all its tokens."""
        memory = None if self.cache is None else find_router_layer(self.cache)
        if memory is not None and memory.decided is not None:
            return memory.decided
        text = {"input_ids": self.input_ids} if self.inputs_embeds is None else {"inputs_embeds": self.inputs_embeds}
        with hooks.forcing(NotForced):
            states = hooks.read(**text, **self._positioned(mask, hooks), prompt_lengths=mask.sum(1)).states
        assert states is not None
        return states.last

    def finish(self, hooks: RoutingHooks, output: Any) -> None:
        """Add the routing of every token to the output, and put right what the cache remembers of ended rows.

        A row that ended early is padded while the others continue, and the router has read the padding.
        """
        if self.input_ids is None or self.mask is None or self.input_ids.shape != self.mask.shape:
            return  # the text's beginning is only in the cache
        bare = isinstance(output, Tensor)
        sequences = output if bare else output.sequences
        real = finished_mask(sequences, self.mask, ends=self.ends)
        cache = self.cache if bare else output.get("past_key_values")
        memory = None if cache is None or (self.value("num_beams") or 1) > 1 else find_router_layer(cache)
        if memory is not None and bool(real[:, self.mask.shape[1] :].all()):
            memory = None  # no row ended early
        if bare and memory is None:
            return
        end = min(limits_of(hooks.base).learned_positions or sequences.shape[1], sequences.shape[1])
        read = hooks.read(input_ids=sequences[:, :end], **self._positioned(real[:, :end], hooks))
        if not bare:
            output.routing = _padded(read.routing, length=sequences.shape[1])
            if read.answers is not None:
                output.turns = list_turns(read.routing.names, read.routing.weights, answers=read.answers)
        if memory is not None and read.remembered is not None:
            memory.replace(read.remembered)

    def _positioned(self, mask: Tensor, hooks: RoutingHooks) -> dict[str, Tensor]:
        """A mask of finished rows and, where the base takes them, position ids that continue the given ones."""
        inputs = {"attention_mask": mask}
        if "position_ids" not in inspect.signature(hooks.base.forward).parameters:
            return inputs
        given = self.position_ids
        if given is None:
            return {**inputs, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
        given = given.repeat_interleave(len(mask) // len(given), 0)
        new = torch.arange(1, mask.shape[1] - given.shape[1] + 1, device=given.device)
        return {**inputs, "position_ids": torch.cat([given, given[:, -1:] + new], 1)}


def _padded(routing: Routing, *, length: int) -> Routing:
    """The routing with tokens appended that were not routed, as padding is not."""
    missing = length - routing.mask.shape[1]
    if missing == 0:
        return routing
    tensors = (None if part is None else F.pad(part, (0, 0, 0, missing)) for part in (routing.weights, routing.logits))
    weights, logits = tensors
    return Routing(routing.names, cast(Tensor, weights), F.pad(routing.mask, (0, missing)), logits)
