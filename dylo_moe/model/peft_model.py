"""The parts of a routed model in one PeftModel, and what PEFT's and Transformers' own methods mean for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModelForCausalLM
from torch import nn
from transformers import PreTrainedModel

from dylo_moe.base.fingerprint import base_identity, fingerprint
from dylo_moe.base.frozen import keep_in_eval
from dylo_moe.continual.growth import Growth
from dylo_moe.experts.expert import ExpertPool
from dylo_moe.model.base_merge import check_unmerged, merge_and_keep, put_back
from dylo_moe.model.config_view import ConfigView
from dylo_moe.model.output import OWN_OUTPUTS
from dylo_moe.model.probe import Probe
from dylo_moe.model.routing_hooks import RoutingHooks
from dylo_moe.routing.config import RouterConfig
from dylo_moe.routing.forward_context import ContextSlot
from dylo_moe.routing.router import Router
from dylo_moe.utils.other_libraries import without_peft_deprecation
from dylo_moe.utils.undo import all_or_nothing

NO_EXPERT = "no-expert-yet"
"""The adapter that PEFT needs to adapt the linears of a pool which begins empty. It is removed at once; its config
stays until the first expert comes, because PEFT asks it what kind of model this is."""


class RoutedPeftModel(PeftModelForCausalLM):
    """A PeftModel whose adapters are the experts of a pool, and whose every forward is routed.

    `DyLoRAMoE` is what users see; this class holds its parts and answers for PEFT's and Transformers' own methods: each
    keeps its meaning, or is refused in favour of the method that a routed model has for it.

    Args:
        base: the loaded base model. Its weights are frozen.
        seen: what `probe`, which switches its own dropout off for good, found of it.
        lora: the experts' config, checked and narrowed to the routed layers.
        router: how tokens are sent to experts.
        names: the experts; all start mature and trainable. None at all: only for a pool that grows.
        balance_coefficient: weight of the balance loss.
        shared: the config of an expert that every token uses; None: there is none.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        seen: Probe,
        lora: LoraConfig,
        router: RouterConfig,
        names: Sequence[str],
        balance_coefficient: float,
        shared: LoraConfig | None = None,
    ) -> None:
        first, *rest = names or [NO_EXPERT]
        with without_peft_deprecation():
            super().__init__(base, copy.deepcopy(lora), adapter_name=first)
        self.context_slot = ContextSlot()
        """The context of the running forward, which the routed linears read."""
        self.seen = seen
        """What is known of how the base runs."""
        self.balance_coefficient = balance_coefficient
        self.router_config = router
        self.base_id, self.base_revision = base_identity(base)
        self.base_fingerprint = None if any(p.is_meta for p in base.parameters()) else fingerprint(base)
        """What the frozen base was when the model was made; None where it has no values."""
        self._before_merge: list[tuple[Any, torch.Tensor]] = []
        self.growth: Growth | None = None
        """What is known of skills, and how the pool grows with new ones; None where nothing is known."""
        self._pool = ExpertPool(self, self.context_slot, lora)
        if names:
            self._pool.register(first, mature=True)
        else:
            self._pool.empty(first)
        if shared is not None:
            self._pool.add_shared(shared)
        for name in rest:
            self._pool.add(name, self._pool.config_for(None), mature=True)
        self._pool.pack()
        self.router = Router(router, hidden_size=seen.hidden_size, names=names).to(self.device)
        self._hooks = RoutingHooks(
            self.base,
            router=self.router,
            pool=self._pool,
            slot=self.context_slot,
            needs_token_types=seen.needs_token_types,
            foreign_state=seen.foreign_state,
        )
        keep_in_eval(self.base)
        self._ddp_params_and_buffers_to_ignore = ["router.step_counts", "router.seen_values"]
        """Each rank has its own; DistributedDataParallel, which reads this, would overwrite them with rank 0's."""

    @property
    def experts(self) -> ExpertPool:
        """The pool, in gate order; iterate it, or take an expert by name or position."""
        return self._pool

    @property
    def allow_expert_growth(self) -> bool:
        """Whether `add_skill` may add experts; `enable_growth` and `fix_pool` change it."""
        return self.growth is not None and self.growth.enabled

    @property
    def base(self) -> PreTrainedModel:
        """The base model, with the adapters injected."""
        return cast(PreTrainedModel, self.base_model.model)

    @property
    def config(self) -> ConfigView:
        """The base's config, with what trainers want to know of a routed model."""
        return ConfigView(self.base.config, not_predictions=OWN_OUTPUTS)

    def apply_trainable(self, changed: Sequence[str] | None = None) -> None:
        """Put each expert's `trainable` onto its adapter and its gate row; PEFT resets it in many of its methods.

        Args:
            changed: the experts whose `trainable` is another; None: anything may be.
        """
        self._pool.apply_trainable(changed)
        for expert in self._pool:
            learns = expert.trainable and not self.allow_expert_growth and self.router_config.is_learned
            self.router.gate[expert.name].requires_grad_(learns)
            self.router.gate_bias[expert.name].requires_grad_(learns)

    @contextmanager
    def whole_or_not_at_all(self) -> Iterator[None]:
        """Leave the model as it was, its pool, gate and skill library too, if the `with` block raises.

        Values of the experts that were there before are not put back, because nothing here changes them.
        """
        check_unmerged(self.base, "change the pool")
        with self._pool.set_aside():
            modules = list(self.modules())  # the experts' own, which are many, are not changed
        known = [] if self.growth is None else [self.growth, self.growth.library]
        parts = [*modules, self._pool, *self._pool.everyone, self._hooks, *known]
        try:
            with all_or_nothing(parts, values=self.router.state_dict(keep_vars=True).values()):
                yield
        except BaseException:
            self._pool.pack()  # what moved into a new block stays there, beside the memory of an expert that is gone
            raise

    @contextmanager
    def route_to(self, experts: str | Sequence[str | None] | None) -> Iterator[None]:
        """Force the routing of every forward inside: one expert, None for the base alone, or a list with
        one entry per row of the batch. Nests; the inner one holds. It holds for the thread that entered it, and no
        other: several threads can run one model, each with its own experts.

        Tokens then compute what those compute that the router sends there: with a shared expert, that one too, and
        "shared" is that one alone, as for tokens of the member `base`.

        Raises:
            ValueError: for an unknown expert, or (in the forward) a list of another length than the batch.
        """
        for name in [experts] if experts is None or isinstance(experts, str) else experts:
            if name is not None:
                self._pool.find(name)
        with self._hooks.forcing(experts):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone; the same as `route_to(None)`, and it leaves trainability as it is."""
        with self.route_to(None):
            yield

    def add_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Refused: an adapter needs a gate row. Use `add_expert`."""
        raise ValueError(f"add_adapter({adapter_name!r}) would add an adapter that no token can reach; use add_expert")

    def delete_adapter(self, adapter_name: str) -> None:
        """Refused: use `remove_expert`, which drops the gate row too."""
        raise ValueError(f"delete_adapter({adapter_name!r}) would leave its gate row behind; use remove_expert")

    def add_weighted_adapter(self, adapters: Sequence[str], *args: Any, **kwargs: Any) -> None:
        """Refused: PEFT's merge has no gate row. Use `merge_experts`."""
        raise ValueError(
            f"add_weighted_adapter of {', '.join(adapters)} would make an adapter that no token can reach; use "
            "merge_experts"
        )

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: which experts are active is decided per token. Use `route_to`."""
        raise ValueError("set_adapter has no meaning for a routed model; use `with model.route_to(name):`")

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: an adapter needs a gate row. Use `import_expert`."""
        raise ValueError("load_adapter would add an adapter that no token can reach; use import_expert(name, path)")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as whatever else would exchange parts of the frozen base, which no checkpoint holds."""
        raise ValueError(
            "this would change the frozen base, which no checkpoint holds; change the base first, save it "
            "(base.save_pretrained), load it from there, and make the model on that"
        )

    set_input_embeddings = set_output_embeddings = resize_position_embeddings = resize_token_embeddings

    def merge_adapter(self, adapter_names: list[str] | None = None, **kwargs: Any) -> None:
        """Merge one expert, and with it the shared one, into the base's weights until `unmerge_adapter`; every token
        then uses it.

        Raises:
            ValueError: unless `adapter_names` holds exactly one expert: a mixture that differs from token to
                token is no single weight; while one is merged already; and with response granularity, where prompts
                go to the base alone.
        """
        if self.router_config.per_response:
            raise ValueError(
                "with granularity='response' prompts go to the base alone, and an expert that is merged into it would "
                "read them too; use `with model.route_to(name):`"
            )
        names = self._only_one(adapter_names)
        check_unmerged(self.base, f"merge expert {names[0]!r}")
        self._before_merge = merge_and_keep(self.base_model, self._pool.layers, names, **kwargs)

    def unmerge_adapter(self) -> None:
        """Take the merged expert out of the base's weights, which are then bit for bit what they were."""
        put_back(self.base_model, self._before_merge)

    def _only_one(self, adapter_names: list[str] | None) -> list[str]:
        """The adapters that make up the only expert of a list: its own, and the shared one's."""
        if adapter_names is None or len(adapter_names) != 1:
            raise ValueError(f"only one expert can be merged, named in adapter_names; got {adapter_names!r}")
        expert = self._pool.find(adapter_names[0])
        return list(dict.fromkeys(item.name for item in (expert, self._pool.shared) if item is not None))

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching packs requests into one row, and keeps no cache that the router could follow."""
        raise ValueError("continuous batching cannot be routed; use generate, with one row for each prompt")

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The plain base again, without experts, router and hooks. This model must not be used afterwards."""
        check_unmerged(self.base, "unload it")
        self._hooks.remove()
        return cast(Any, self.base_model).unload(*args, **kwargs)

    def merge_and_unload(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> nn.Module:
        """The base with one expert, and with it the shared one, merged into its weights.

        Raises:
            ValueError: unless `adapter_names` holds exactly one expert.
        """
        names = self._only_one(adapter_names)
        check_unmerged(self.base, f"merge expert {names[0]!r}")
        self._hooks.remove()
        return cast(Any, self.base_model).merge_and_unload(*args, adapter_names=names, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the experts again, because deepcopy and pickle give every matrix its own memory."""
        super().__setstate__(state)
        self._pool.pack()

    def train(self, mode: bool = True) -> RoutedPeftModel:
        """Set the mode as PyTorch does, but not in the experts' own modules, where it means nothing.

        The parts of the frozen base that draw random numbers in training stay in eval mode. Trainers call this at every
        step, so that it must not take longer the more experts there are.
        """
        with self._pool.set_aside():
            super().train(mode)
            keep_in_eval(self.base)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as PyTorch does, of the experts that learn; `freeze` dropped those of the others."""
        with self._pool.set_aside():
            super().zero_grad(set_to_none)
        for parameter in self._pool.learning():
            if parameter.grad is not None:
                parameter.grad = None if set_to_none else torch.zeros_like(parameter.grad)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Switch it on as Transformers does; recomputation uses the routing of the forward that it recomputes.

        Raises:
            ValueError: for use_reentrant=True, under which a router outside the layer gets no gradient.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise ValueError("gradient checkpointing with use_reentrant=True loses the router; use use_reentrant=False")
        if "context_fn" in options:
            raise ValueError("context_fn is needed to keep each forward's own routing; leave it out")
        options["context_fn"] = self.context_slot.checkpoint_contexts
        base = self.base
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(options, **kwargs)
        else:
            base.gradient_checkpointing_enable(options, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The newer name of `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedPeftModel:
        """Pack the experts again after `.to(...)` moved each of their matrices."""
        result = super()._apply(fn, recurse)
        self._pool.pack()
        return result
