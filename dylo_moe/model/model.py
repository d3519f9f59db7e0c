"""DyLoRAMoE: a frozen base, a pool of experts and a router, wired into one PeftModel."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModelForCausalLM
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.base.fingerprint import base_identity
from dylo_moe.base.frozen import check_base, switch_off_dropout
from dylo_moe.base.loading import load_base
from dylo_moe.continual.base_texts import write_texts
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.continual.growth import Growth, SkillDecision
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.experts.adapter import (
    LORA_ALPHA,
    LORA_DROPOUT,
    LORA_R,
    NUM_EXPERTS,
    lora_problems,
    read_adapter,
    routed_lora_config,
)
from dylo_moe.experts.expert import Expert, ExpertPool, check_name
from dylo_moe.model.generation import GenerateCall
from dylo_moe.model.hf_methods import ConfigView
from dylo_moe.model.loss import _uniform_loss, check_plain_head, chunked_loss
from dylo_moe.model.output import OWN_OUTPUTS, DyLoRAMoEOutput
from dylo_moe.model.routing_hooks import NotForced, RoutingHooks
from dylo_moe.routing.config import BALANCE_COEFFICIENT, BASE, RouterConfig
from dylo_moe.routing.forward_context import ContextSlot
from dylo_moe.routing.router import Router, Routing

NO_EXPERT = "no-expert-yet"
"""The adapter that PEFT needs to adapt the linears of a pool which begins empty. It goes at once; its config stays
until the first expert comes, for PEFT asks it what kind of model this is."""

ROUTER_INPUTS = ("position_ids", "labels", "prompt_lengths")
"""What the router reads of a batch besides its tokens and their mask."""


class DyLoRAMoE(PeftModelForCausalLM):
    """A frozen causal language model, many LoRA experts on it, and a router that sends each token to some.

    For every routed linear, with e over the experts of a token's routing:

        y = W x + sum_e w_e s_e B_e A_e x

    One forward pass: the router reads hidden states of the frozen part of the model, so what an expert
    learns never changes where tokens are sent. LoRA is Hu et al. 2021 (arXiv:2106.09685), the mixture
    per token Shazeer et al. 2017 (arXiv:1701.06538, eq. 1) with LoRA experts on frozen weights; we
    differ in one gate for the whole model, and in features that are a causal exponential mean.

    It is a PeftModel, and each expert is an ordinary adapter in it. Make it with `from_base` or
    `from_pretrained`.

    Args:
        base: the loaded base model. Its weights are frozen, its own dropout is switched off for good.
        lora: the experts' config, checked and narrowed to the routed layers by `from_base`.
        router: see `RouterConfig`.
        names: the experts; all start mature and trainable. None at all: only for a pool that grows.
        balance_coefficient: weight of the balance loss.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        lora: LoraConfig,
        router: RouterConfig,
        names: Sequence[str],
        balance_coefficient: float,
    ) -> None:
        first, *rest = names or [NO_EXPERT]
        switch_off_dropout(base)
        super().__init__(base, copy.deepcopy(lora), adapter_name=first)
        self._slot = ContextSlot()
        self.balance_coefficient = balance_coefficient
        self.router_config = router
        self.base_id, self.base_revision = base_identity(base)
        self.growth: Growth | None = None
        """The skill library and what follows from it; None where nothing is known of skills."""
        self._grows = False
        self._loss_chunk_size: int | None = None
        self._pool = ExpertPool(self, self._slot, lora)
        if names:
            self._pool.register(first, mature=True)
        else:
            self._pool.empty(first)
        for name in rest:
            self._pool.add(name, self._pool.config_for(None), mature=True)
        self._pool.pack()
        hidden_size = base.config.get_text_config().hidden_size
        self.router = Router(router, hidden_size=hidden_size, names=names).to(self.device)
        self._hooks = RoutingHooks(self.base, router=self.router, pool=self._pool, slot=self._slot)
        self._ddp_params_and_buffers_to_ignore = ["router.step_counts", "router.seen_values"]
        """Of each rank its own; DistributedDataParallel, which reads this, would give all those of the first."""

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | str,
        *,
        num_experts: int | None = None,
        lora: LoraConfig | None = None,
        router: RouterConfig | None = None,
        names: Sequence[str] | None = None,
        allow_expert_growth: bool = False,
        growth: GrowthConfig | None = None,
        balance_coefficient: float = BALANCE_COEFFICIENT,
    ) -> DyLoRAMoE:
        """A new model on a base: fresh experts (zero delta), a small random gate; or one that grows, and begins empty.

        Args:
            base: a hub id, a folder, "smollm2-135m", or a loaded causal language model.
            num_experts: how many, by default 4; all mature and trainable, routing is sparse top-k from the first step.
            lora: default r=16, alpha=32, dropout 0.05, all linears of the routed layers.
            router: default `RouterConfig()`.
            names: the experts' names; default expert_0, expert_1, ...
            allow_expert_growth: the pool begins without experts, and `add_skill` grows one for each new kind of data.
                `base` is a member: tokens of no known skill go to the unchanged base. Gate rows are fitted, never
                trained by gradients.
            growth: when to grow, and how; default `GrowthConfig()`.
            balance_coefficient: weight of the balance loss.

        Raises:
            ValueError: for a value out of range, a LoraConfig that cannot be routed, or a base that is
                no decoder-only causal language model.
            BaseUnavailableError: when the base cannot be loaded.
        """
        router = RouterConfig() if router is None else router
        if not allow_expert_growth and num_experts is None:
            num_experts = NUM_EXPERTS
        problems = _pool_problems(names, num_experts, router.top_k, balance_coefficient)
        if allow_expert_growth and (names is not None or num_experts is not None):
            problems.append("with allow_expert_growth a pool begins without experts: leave num_experts and names out")
        elif growth is not None and not allow_expert_growth:
            problems.append("growth has no meaning with allow_expert_growth=False")
        if allow_expert_growth and not router.is_learned:
            problems.append(f"a pool that grows needs policy 'learned'; this router's is {router.policy!r}")
        if not router.is_learned and balance_coefficient not in (0, BALANCE_COEFFICIENT):
            problems.append(
                f"balance_coefficient is {balance_coefficient!r}, but with policy {router.policy!r} nothing can be "
                "balanced; leave it out"
            )
        if problems:
            raise ValueError("DyLoRAMoE.from_base: " + "; ".join(problems))
        if isinstance(base, str):
            base = load_base(base)
        check_base(base)
        names = [f"expert_{index}" for index in range(num_experts or 0)] if names is None else list(names)
        for name in names:
            check_name(name, modules=(path for path, _ in base.named_modules()))
        if lora is None:
            lora = LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules="all-linear")
        index = router.layer_index(base.config.get_text_config().num_hidden_layers)
        lora = routed_lora_config(base, lora, router_index=index)
        model = cls(base, lora=lora, router=router, names=names, balance_coefficient=balance_coefficient)
        if allow_expert_growth:
            model.enable_growth(growth)
        return model

    # The experts.

    @property
    def experts(self) -> ExpertPool:
        """The pool, in gate order; iterate it, or take an expert by name or position."""
        return self._pool

    def add_expert(self, name: str, *, rank: int | None = None, skill: str | None = None) -> Expert:
        """A new nascent expert with zero delta, and its gate row; routing is dense until it matures.

        No old expert and no old gate row changes. Everything stays as trainable as it was; see `freeze`.

        Args:
            name: letters, digits, '_' and '-'.
            rank: default the pool's; alpha follows, so that the scaling stays.
            skill: what it is for; kept in the checkpoint.
        """
        self._check_learned("add_expert")
        expert = self._pool.add(name, self._pool.config_for(rank), mature=False, skill=skill)
        self._pool.pack()
        self.router.add_row(name)
        return expert

    def import_expert(self, name: str, path: str, *, skill: str | None = None, **kwargs: Any) -> Expert:
        """Take a stock PEFT LoRA adapter into the pool: a folder or a hub id, written by PEFT 0.18 or newer.

        Rank, targets and scaling are the adapter's own; `with model.route_to(name)` gives its own logits. It
        comes in like an expert of `add_expert`: nascent, with a small random gate row, trainable. Its dropout
        becomes the pool's, because the experts of a layer share one mask.

        Args:
            name: in this pool.
            skill: what it is for; kept in the checkpoint.
            kwargs: of the hub: revision, subfolder, token, cache_dir.

        Raises:
            ValueError: with every reason why this adapter cannot be an expert here; the model stays as it was.
        """
        self._check_learned("import_expert")
        check_name(name, taken=self._pool, modules=self._pool.base_modules())
        config, state = read_adapter(path, **kwargs)
        index = self.router_config.layer_index(self.base.config.get_text_config().num_hidden_layers)
        problems = lora_problems(self.base, config, router_index=index)
        if problems:
            raise ValueError(f"adapter {path} cannot be an expert: " + "; ".join(problems))
        expert = self._pool.load(name, config, state, path=path, skill=skill)
        self.router.add_row(name)
        return expert

    def _check_learned(self, what: str) -> None:
        if not self.router_config.is_learned:
            raise ValueError(
                f"{what} needs a gate that learns, and this router's policy is {self.router_config.policy!r}"
            )

    def mature(self, name: str) -> None:
        """An expert is done learning beside the others; with no nascent one left, routing is sparse."""
        self._pool[name].mature = True

    def remove_expert(self, name: str) -> list[str]:
        """Delete an expert, its gate row and its skills in the library; the others stay bit for bit.

        Returns:
            The names of these skills.
        """
        self._pool.remove(name)
        self.router.remove_row(name)
        self.apply_trainable()
        return [] if self.growth is None else self.growth.forget(name)

    def freeze(self, *names: str) -> None:
        """Stop training these experts and their gate rows, whose gradients are dropped. `unfreeze` undoes it."""
        self._set_trainable(names, False)
        for name in names:
            for parameter in (*self._pool.parameters(name), self.router.gate[name], self.router.gate_bias[name]):
                parameter.grad = None

    def unfreeze(self, *names: str) -> None:
        """Train these experts and their gate rows again."""
        self._set_trainable(names, True)

    def _set_trainable(self, names: Sequence[str], trainable: bool) -> None:
        for expert in [self._pool[name] for name in names]:
            expert.trainable = trainable
        self.apply_trainable()

    def apply_trainable(self, changed: Sequence[str] | None = None) -> None:
        """Put each expert's `trainable` onto its adapter and its gate row; PEFT resets it in many of its methods.

        Args:
            changed: the experts whose `trainable` is another; None: anything may be.
        """
        self._pool.apply_trainable(changed)
        for expert in self._pool:
            learns = expert.trainable and not self._grows and self.router_config.is_learned
            self.router.gate[expert.name].requires_grad_(learns)
            self.router.gate_bias[expert.name].requires_grad_(learns)

    # Routing.

    @property
    def base(self) -> PreTrainedModel:
        """The base model, with the adapters injected."""
        return cast(PreTrainedModel, self.base_model.model)

    @property
    def config(self) -> ConfigView:
        """The base's config, with what trainers want to know of a routed model."""
        return ConfigView(self.base.config, not_predictions=OWN_OUTPUTS)

    @contextmanager
    def route_to(self, experts: str | Sequence[str | None] | None) -> Iterator[None]:
        """Force the routing of every forward inside: one expert, None for the base alone, or a list with
        one entry per row of the batch. Nests; the inner one holds.

        Raises:
            ValueError: for an unknown expert, or (in the forward) a list of another length than the batch.
        """
        for name in [experts] if experts is None or isinstance(experts, str) else experts:
            if name is not None:
                self._pool[name]
        with self._hooks.forcing(experts):
            yield

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Routing:
        """Where these tokens go; runs the base up to the router and no further.

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: [batch, seq], 0 on padding.
            inputs: position_ids, prompt_lengths or labels, as in `forward`.
        """
        return self._hooks.read(input_ids=input_ids, attention_mask=attention_mask, **inputs).routing

    @torch.no_grad()
    def router_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """What the gate reads of these tokens, whatever `route_to` asks for: fp32 [batch, seq, hidden].

        Args:
            inputs: as in `route`.
        """
        with self._hooks.forcing(NotForced):
            features = self._hooks.read(input_ids=input_ids, attention_mask=attention_mask, **inputs).features
        if features is None:
            raise ValueError("an expert is merged into the base, so that the base alone cannot be read; unmerge it")
        return features

    def text_features(self, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
        """What the gate reads of each text, padding left out: fp32 [tokens, hidden] each, on the model's device.

        Args:
            batches: each with input_ids [batch, seq] and, where padded, attention_mask; also position_ids, labels or
                prompt_lengths, as in `forward`.
        """
        texts = []
        for batch in batches:
            ids = batch["input_ids"].to(self.device)
            mask = batch.get("attention_mask", torch.ones_like(ids)).to(self.device).bool()
            given = {name: batch[name].to(self.device) for name in ROUTER_INPUTS if name in batch}
            features = self.router_features(ids, mask, **given)
            texts += [row[real] for row, real in zip(features, mask, strict=True) if real.any()]
        return texts

    @torch.no_grad()
    def initialize_router(self, batches: Iterable[dict[str, Tensor]], *, seed: int = 0) -> None:
        """Start the gate from text, before training: one cluster of the texts' features for each expert.

        Nothing but unlabelled text is used. Without it the gate starts small and random, and takes longer to
        find out which kinds of text there are. A pool that was trained already must not be started again.

        Args:
            batches: each with input_ids [batch, seq] and, where padded, attention_mask; with sequence granularity
                also labels or prompt_lengths, which tell where prompts end. All in all at least as many rows as
                there are experts.
            seed: of the clustering.
        """
        self._check_learned("initialize_router")
        texts = self.text_features(batches)
        if len(texts) < len(self._pool):
            raise ValueError(f"initialize_router was given {len(texts)} texts for {len(self._pool)} experts; give more")
        self.router.initialize(texts, seed=seed)

    # Growth.

    @property
    def allow_expert_growth(self) -> bool:
        """Whether `add_skill` may add experts; `enable_growth` and `fix_pool` change it."""
        return self._grows

    def enable_growth(self, config: GrowthConfig | None = None, *, seed: int = 0) -> None:
        """From here on `add_skill` may grow the pool, gate rows are fitted, and `base` is a member.

        Of a pool that was trained jointly the experts and their gate rows stay as they are.

        Args:
            config: default: as it was, or `GrowthConfig()`.
            seed: of the draws that the base's own gate row is fitted with, where experts are there already.

        Raises:
            ValueError: for a pool whose skills are not known; tell it with `know_skill`, or all text is new to it.
        """
        self._check_learned("enable_growth")
        if len(self._pool) and (self.growth is None or not self.growth.library.skills):
            raise ValueError(
                "this pool's skills are not known, so that all text would be new to it; know_skill() first"
            )
        growth = self._make_growth(config)
        if not self.router.has_base:
            self.router.add_base()
            if len(self._pool):
                self._write_base(seed)
                growth.fit(BASE, seed=seed)
        self._grows = True
        self.apply_trainable()

    def fix_pool(self, config: GrowthConfig | None = None) -> None:
        """From here on `add_skill` adds no expert: what is new is reported. The library stays.

        Args:
            config: how to judge; default: as it was, or `GrowthConfig()`.
        """
        self._make_growth(config)
        self._grows = False
        self.apply_trainable()

    def restore_growth(self, config: GrowthConfig, library: SkillLibrary, *, grows: bool) -> None:
        """Put back what a checkpoint knows of the skills."""
        self._make_growth(config).library = library
        self._grows = grows
        self.apply_trainable()

    def _make_growth(self, config: GrowthConfig | None = None) -> Growth:
        if self.growth is None:
            self.growth = Growth(GrowthConfig(), router=self.router, library=SkillLibrary(self.router.hidden_size))
        if config is not None:
            self.growth.config = config
        return self.growth

    @property
    def library(self) -> SkillLibrary:
        """What is known of each skill.

        Raises:
            ValueError: where nothing is: the pool was not grown, and was told nothing.
        """
        if self.growth is None:
            raise ValueError("this model has no skill library; enable_growth() begins one")
        return self.growth.library

    def knows(self, skill: str) -> bool:
        """Whether the library has a skill of that name."""
        return self.growth is not None and skill in self.growth.library.skills

    def add_skill(
        self,
        name: str,
        batches: Iterable[dict[str, Tensor]],
        *,
        rank: int | None = None,
        expert: str | None = None,
        seed: int = 0,
    ) -> SkillDecision:
        """Look at data, and where it is new grow an expert for it; that expert alone is then trainable.

        The library takes up the data's statistics and the new gate row is fitted at once, for they follow from the
        frozen base alone. What is left to do: train, with `route_to(decision.expert)` around the forward so that all
        tokens teach it, then `mature(decision.expert)`. Until then routing is dense.

        Args:
            name: of the skill and, where it is new, of its expert.
            batches: a sample of it, as for `text_features`; 100 texts are plenty.
            rank: of a new expert; default the pool's.
            expert: an expert of the pool that is to learn this data whatever it is. The gate sends it there only
                after its row was fitted again.
            seed: of the draws and of the new expert's start.

        Raises:
            ValueError: for a name that cannot be an expert's, an unknown expert, or fewer than two texts; nothing has
                changed then.
        """
        self._check_learned("add_skill")
        if self.growth is None:
            raise ValueError("this model has no skill library, so that nothing can be said to be new; enable_growth()")
        if expert is not None:
            self._pool[expert]
        texts, grow = self._some_features(name, batches), None
        if self._grows:
            self._write_base(seed)
            grow = partial(self._grow, name, rank=rank, seed=seed)
        decision = self.growth.take(name, texts, expert=expert, grow=grow, seed=seed)
        if decision.expert is not None:
            changed = [other for other in self._pool if other.trainable != (other.name == decision.expert)]
            for other in changed:
                other.trainable = not other.trainable
            self.apply_trainable([other.name for other in changed])
        return decision

    def know_base(self, batches: Iterable[dict[str, Tensor]], *, seed: int = 0) -> None:
        """Tell the library what should stay with the unchanged base, from a sample of general text; no row changes.

        Gate rows that are fitted from here on are fitted against it, and no more against what was told before. Where
        nothing was told when the first one is fitted, texts that the base itself writes stand in.

        Args:
            batches: as for `add_skill`.
        """
        growth = self._make_growth()
        if BASE in growth.library:
            growth.library.forget(BASE)
        growth.library.learn(BASE, self._some_features(BASE, batches), expert=BASE, seed=seed)

    def _write_base(self, seed: int) -> None:
        """What the base writes by itself stands for general text, unless there is some."""
        if self.growth is not None and BASE not in self.growth.library:
            with self.route_to(None):
                self.know_base([{"input_ids": write_texts(self, seed=seed)}], seed=seed)

    @torch.no_grad()
    def _grow(self, name: str, *, source: str | None, rank: int | None, seed: int) -> None:
        check_name(name, taken=self._pool, modules=self._pool.base_modules())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.add_expert(name, rank=rank, skill=name)
        if source is not None:
            self._pool.copy(source, name)

    def _some_features(self, skill: str, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
        texts = self.text_features(batches)
        if len(texts) < 2:
            raise ValueError(f"skill {skill!r} was given {len(texts)} texts; give at least two, better a hundred")
        return texts

    def know_skill(self, name: str, batches: Iterable[dict[str, Tensor]], *, seed: int = 0) -> str:
        """Tell the library of a skill that the pool has already, from a sample of it; no expert and no row changes.

        Args:
            name: of the skill.
            batches: as for `add_skill`.

        Returns:
            The expert that most of its tokens choose, whose skill it counts as.
        """
        growth, texts = self._make_growth(), self._some_features(name, batches)
        shares = growth.shares(texts)
        expert = max(shares.keys() - {BASE}, key=shares.__getitem__)
        growth.library.learn(name, texts, expert=expert, seed=seed)
        growth.library.note_shares(name, shares)
        return expert

    # Forward and generate.

    @property
    def loss_chunk_size(self) -> int | None:
        """Tokens whose logits exist at once where a loss is computed; None: those of all tokens, as in Transformers.

        With a number, a forward with labels gives `token_losses` and no logits; see model/loss.py. TRL's fused head
        goes its own way. Setting it runs the base once on three tokens.

        Raises:
            ValueError: for a number below 1.
            FullLogitsNeeded: where the base's loss is more than its head and the cross-entropy; it stays as it was.
        """
        return self._loss_chunk_size

    @loss_chunk_size.setter
    def loss_chunk_size(self, size: int | None) -> None:
        if size is not None:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"loss_chunk_size is {size!r}; it must be a whole number of at least 1, or None")
            with self.route_to(None):
                check_plain_head(self.base)
        self._loss_chunk_size = size

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        prompt_lengths: Tensor | None = None,
        label_smoothing: float = 0.0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DyLoRAMoEOutput | tuple:
        """One pass: route every token, mix its experts, and with `labels` compute the loss.

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: [batch, seq (+ cached)], 0 on padding; None: no padding.
            labels: int64 [batch, seq], -100 where nothing is predicted.
            num_items_in_batch: predicted tokens of the whole optimizer step, as the Trainer passes it; the
                language-model loss is then divided by it, so that accumulation changes nothing.
            num_tokens_in_batch: real tokens of the whole optimizer step, which the router's losses are
                divided by. Where only `num_items_in_batch` is known, they are taken over the predicted
                tokens; where neither is, over the real tokens of this batch.
            prompt_lengths: int64 [batch], in real tokens; with sequence granularity, where each row's prompt
                ends. None: before its first label that is not -100, else at its 32nd real token.
            label_smoothing: from 0 to below 1; this part of each label is spread evenly over the vocabulary
                (Szegedy et al. 2015, arXiv:1512.00567, section 7). It enters `loss`; `lm_loss` stays plain.
            kwargs: passed on to the base. Where `position_ids` start over within a row, another text begins,
                whose routing does not see the one before.
        """
        if "adapter_names" in kwargs:
            raise ValueError("adapter_names has no meaning for a routed model; use `with model.route_to([...]):`")
        if prompt_lengths is not None and not self.router_config.per_sequence:
            raise ValueError("prompt_lengths has no meaning with granularity='token': every token is routed on its own")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing!r}; it must be from 0 to below 1")
        kwargs.pop("output_router_logits", None)  # how TRL asks for aux_loss, which is always there
        num_items = num_items_in_batch
        if labels is not None:
            count = (labels[:, 1:] != -100).sum() if num_items is None else torch.as_tensor(num_items)
            kwargs["num_items_in_batch"] = count.clamp_min(1)  # no label at all is a loss of 0, not of nan
            kwargs.setdefault("use_cache", False)  # with a cache, Transformers lets packed texts see each other
        chunk_size = self._loss_chunk_size if labels is not None else None
        if kwargs.get("fused_lm_head") or kwargs.get("shift_labels") is not None:  # which say how the loss is computed
            chunk_size = None
        if chunk_size is not None:
            kwargs.pop("skip_logits", None)  # how the Trainer asks Liger's kernels for what is done here
            kwargs["skips_head"] = True
        out = self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            prompt_lengths=prompt_lengths,
            return_dict=True,
            **kwargs,
        )
        result = out  # of TRL's or Liger's fused head: log-probabilities of the labels, or their loss, and no logits
        if "logits" in out:
            result = DyLoRAMoEOutput(
                logits=out.logits if chunk_size is None else None,
                past_key_values=out.get("past_key_values"),
                hidden_states=out.get("hidden_states"),
                attentions=out.get("attentions"),
                routing=out.routing,
            )
        if labels is not None:
            count = kwargs["num_items_in_batch"]
            if chunk_size is not None:
                self._add_chunked_loss(result, out.head_input, labels, chunk_size, count, label_smoothing)
            else:
                result.lm_loss = result.loss = out.loss
                if label_smoothing > 0:
                    uniform = _uniform_loss(out.get("logits"), labels) / count
                    result.loss = (1 - label_smoothing) * out.loss + label_smoothing * uniform
            self._add_router_losses(result, labels, num_items, num_tokens_in_batch)
        return result if return_dict is not False else result.to_tuple()

    def _add_chunked_loss(
        self, result: Any, hidden: Tensor, labels: Tensor, chunk_size: int, count: Tensor, label_smoothing: float
    ) -> None:
        head = cast(nn.Linear, self.base.get_output_embeddings())
        losses = chunked_loss(hidden, head, labels, chunk_size=chunk_size, label_smoothing=label_smoothing)
        self._hooks.name_nan(result.routing, hidden.isnan().any(-1) | losses.plain.isnan())
        count = count.to(hidden.device)
        result.loss = losses.trained.sum() / count
        result.lm_loss = losses.plain.sum() / count if label_smoothing > 0 else result.loss
        result.token_losses = losses.plain

    def _add_router_losses(
        self, result: Any, labels: Tensor, num_items: Tensor | int | None, num_tokens: Tensor | int | None
    ) -> None:
        routing = result.routing
        tokens = None
        if num_tokens is None and num_items is not None:
            tokens, num_tokens = F.pad(labels[:, 1:] != -100, (0, 1)), num_items
        if self.training and routing.logits is not None:
            self.router.observe(routing)
        losses = self.router.losses(routing, tokens=tokens, num_tokens=num_tokens)
        config = self.router_config
        result.balance_loss, result.z_loss, result.entropy_loss = losses
        result.aux_loss = (
            self.balance_coefficient * losses.balance
            + config.z_loss_coefficient * losses.z
            + config.entropy_coefficient * losses.entropy
        )
        result.loss = result.loss + result.aux_loss

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, cached, with every row and every token routed on its own.

        With sequence granularity each row is decided on its prompt, once; a cache that is passed in and was
        decided already keeps its decision. With `return_dict_in_generate=True` and a prompt of ids, the result
        also has `.routing`, of every token of `sequences`.

        Raises:
            ValueError: for a router that reads the last hidden states and decides token by token; for
                compiled decoding, which does not exist yet.
        """
        call = GenerateCall(args, kwargs, defaults=self.base.generation_config)
        call.check(self._hooks)
        with self._hooks.generating(call.prompt(self._hooks)):
            output = super().generate(*args, **call.keywords)
            call.finish(self._hooks, output)
        return output

    # What PEFT and Transformers would otherwise do to us.

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

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: which experts are active is decided per token. Use `route_to`."""
        raise ValueError("set_adapter has no meaning for a routed model; use `with model.route_to(name):`")

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: an adapter needs a gate row. Use `import_expert`."""
        raise ValueError("load_adapter would add an adapter that no token can reach; use import_expert(name, path)")

    def merge_adapter(self, adapter_names: list[str] | None = None, **kwargs: Any) -> None:
        """Merge one expert into the base's weights until `unmerge_adapter`; every token then uses it.

        Raises:
            ValueError: unless `adapter_names` holds exactly one expert: a mixture that differs from token to
                token is no single weight.
        """
        cast(Any, self.base_model).merge_adapter([self._only_one(adapter_names)], **kwargs)

    def _only_one(self, adapter_names: list[str] | None) -> str:
        if adapter_names is None or len(adapter_names) != 1:
            raise ValueError(f"only one expert can be merged, named in adapter_names; got {adapter_names!r}")
        return self._pool[adapter_names[0]].name

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching packs requests into one row, and keeps no cache that the router could follow."""
        raise ValueError("continuous batching cannot be routed; use generate, with one row for each prompt")

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The plain base again, without experts, router and hooks. This model must not be used afterwards."""
        self._hooks.remove()
        return cast(Any, self.base_model).unload(*args, **kwargs)

    def merge_and_unload(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> nn.Module:
        """The base with one expert merged into its weights.

        Raises:
            ValueError: unless `adapter_names` holds exactly one expert.
        """
        name = self._only_one(adapter_names)
        self._hooks.remove()
        return cast(Any, self.base_model).merge_and_unload(*args, adapter_names=[name], **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After deepcopy and pickle, which give every matrix memory of its own."""
        super().__setstate__(state)
        self._pool.pack()

    def train(self, mode: bool = True) -> DyLoRAMoE:
        """As in PyTorch, past the experts' own modules, in which the mode means nothing: trainers call this every step,
        and it must not take longer the more experts there are."""
        with self._pool.set_aside():
            return super().train(mode)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in PyTorch; see `train`. A frozen expert has no gradient: `freeze` drops what there was."""
        with self._pool.set_aside():
            super().zero_grad(set_to_none)
        for parameter in self._pool.learning():
            if parameter.grad is not None:
                parameter.grad = None if set_to_none else torch.zeros_like(parameter.grad)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As in Transformers; recomputation uses the routing of the forward that it recomputes.

        Raises:
            ValueError: for use_reentrant=True, under which a router outside the layer gets no gradient.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise ValueError("gradient checkpointing with use_reentrant=True loses the router; use use_reentrant=False")
        if "context_fn" in options:
            raise ValueError("context_fn is needed to keep each forward's own routing; leave it out")
        options["context_fn"] = self._slot.checkpoint_contexts
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

    def _apply(self, fn: Any, recurse: bool = True) -> DyLoRAMoE:
        """After `.to(...)`: lay the experts behind one another again."""
        result = super()._apply(fn, recurse)
        self._pool.pack()
        return result

    # Checkpoints.

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the folder that docs/checkpoints.md describes: experts, router, and how to check them.

        Args:
            save_directory: a new folder, or an older checkpoint of ours, which is replaced. The Trainer's own
                folders may also hold what it puts there.

        Raises:
            ValueError: for a folder that holds other files, or an option of PEFT's that cannot apply.
        """
        from dylo_moe.model.saving import save_checkpoint

        if not kwargs.pop("is_main_process", True):
            return
        refused = [name for name, value in kwargs.items() if name != "state_dict" or value is not None]
        if refused:
            raise ValueError(f"save_pretrained takes only the folder; {', '.join(sorted(refused))} cannot apply")
        save_checkpoint(self, save_directory, beside="state_dict" in kwargs)  # which only the Trainer passes

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str, base: PreTrainedModel | str | None = None, **kwargs: Any
    ) -> DyLoRAMoE:
        """Read a checkpoint folder back, bit for bit, after checking every file and the base.

        Args:
            path: the folder.
            base: the base model, loaded or by name; None: the one that the checkpoint names.
            kwargs: passed on to load the base (for example dtype).

        Raises:
            CheckpointError: for a missing, extra, altered or misshapen file, or another base.
        """
        from dylo_moe.model.saving import load_checkpoint

        return load_checkpoint(cls, path, base, **kwargs)


def _pool_problems(names: Any, num_experts: Any, top_k: int, balance_coefficient: Any) -> list[str]:
    problems = []
    whole = isinstance(num_experts, int) and not isinstance(num_experts, bool)
    if num_experts is not None and (not whole or num_experts < 1):
        problems.append(f"num_experts is {num_experts!r}; it must be a whole number of at least 1")
    if isinstance(names, str):
        problems.append(f"names is {names!r}; it must be a list of names")
        names = []
    elif names is not None:
        names = list(names)
        if not names:
            problems.append("names is empty; a pool needs at least 1 expert")
    for index, name in enumerate(names or ()):
        try:
            check_name(name, taken=names[:index])
        except ValueError as error:
            problems.append(str(error))
    count = len(names) if names is not None else num_experts
    if isinstance(count, int) and 0 < count < top_k:
        problems.append(f"top_k is {top_k}, but there are only {count} experts")
    if not isinstance(balance_coefficient, (int, float)) or not 0 <= balance_coefficient < math.inf:
        problems.append(f"balance_coefficient is {balance_coefficient!r}; it must be a finite number of at least 0")
    return problems
