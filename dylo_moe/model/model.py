"""DyLoRAMoE: a frozen base, a pool of experts and a router, wired into one PeftModel."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe.base.frozen import check_base, untouched_on_failure
from dylo_moe.base.loading import load_base
from dylo_moe.base.noise import noise_problem
from dylo_moe.base.stored import warn_of_changes
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.continual.growth import Growth, SkillDecision
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.experts.adapter import config_at, lora_config, lora_problems, read_adapter, routed_lora_config
from dylo_moe.experts.config import ExpertConfig
from dylo_moe.experts.expert import Expert, check_name
from dylo_moe.experts.invocation import take_invocation
from dylo_moe.experts.merging import Merge, merge_experts
from dylo_moe.model.base_merge import check_unmerged
from dylo_moe.model.forward import RoutedForward
from dylo_moe.model.loading import load_checkpoint, load_into
from dylo_moe.model.pool_options import pool_problems
from dylo_moe.model.probe import probe
from dylo_moe.model.routing_hooks import NotForced
from dylo_moe.model.saving import save_checkpoint
from dylo_moe.model.turns_of_base import turns_of_base
from dylo_moe.routing.config import BALANCE_COEFFICIENT, SHARED, GrowingRouterConfig, RouterConfig
from dylo_moe.routing.features import RouterState
from dylo_moe.routing.forward_context import ForwardContext
from dylo_moe.routing.router import Routing
from dylo_moe.routing.token_masks import text_starts
from dylo_moe.routing.turns import find_answers
from dylo_moe.utils.errors import DyLoRAWarning
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.harmless import harmless_logger
from dylo_moe.utils.words import counted

LOGGER = harmless_logger(__name__)

ROUTER_INPUTS = ("position_ids", "labels", "prompt_lengths")
"""What the router reads of a batch besides its tokens and their mask."""


class DyLoRAMoE(RoutedForward):
    """A frozen causal language model, many LoRA experts on it, and a router that sends each token to some.

    For every routed linear, with e over the experts of a token's routing:

        y = W x + s_0 B_0 A_0 x + sum_e w_e s_e B_e A_e x

    where expert 0 is the shared one, which every token uses, if the model has one (`from_base`, shared_rank).

    One forward pass: the router reads hidden states of the frozen part of the model, so what an expert
    learns never changes where tokens are sent. LoRA is Hu et al. 2021 (arXiv:2106.09685), the mixture
    per token Shazeer et al. 2017 (arXiv:1701.06538, eq. 1) with LoRA experts on frozen weights, the shared
    expert that of Dai et al. 2024 (arXiv:2401.06066, section 3.2); we differ in one gate for the whole model,
    and in features that are a causal exponential mean.

    It is a PeftModel, and each expert is an ordinary adapter in it. Make it with `from_base` or
    `from_pretrained`.

    Args:
        base: the loaded base model. Its weights are frozen, its own dropout is switched off for good.
        lora: the experts' config, checked and narrowed to the routed layers by `from_base`.
        router: see `RouterConfig`.
        names: the experts; all start mature and trainable. None at all: only for a pool that grows.
        balance_coefficient: weight of the balance loss.
        shared: the config of the shared expert, or None.
    """

    left_out: str | None = None
    """What "all-linear", or names that other modules have too, left out when the model was made, and why, in words."""

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | str,
        *,
        num_experts: int | None = None,
        lora: LoraConfig | None = None,
        router: RouterConfig | None = None,
        names: Sequence[str] | None = None,
        shared_rank: int = 0,
        shared_alpha: float | None = None,
        allow_expert_growth: bool = False,
        growth: GrowthConfig | None = None,
        balance_coefficient: float = BALANCE_COEFFICIENT,
    ) -> DyLoRAMoE:
        """A new model on a base: fresh experts (zero delta), a small random gate; or one that grows, and begins empty.

        Args:
            base: a hub id, a folder, "smollm2-135m", "gemma3-270m", or a loaded model.
            num_experts: how many, by default 4; all mature and trainable, routing is sparse top-k from the first step.
            lora: default r=16, alpha=32, dropout 0.05, all linears of the routed layers.
            router: default `RouterConfig()`, or `GrowingRouterConfig()` for a pool that grows.
            names: the experts' names; default expert_0, expert_1, ...
            shared_rank: of one more expert, "shared", that every token uses beside those it is routed to; 0: none.
            shared_alpha: its alpha; default: as follows from its rank, so that its scaling is that of the others.
            allow_expert_growth: the pool begins without experts, and `add_skill` grows one for each new kind of data.
                `base` is a member: tokens of no known skill go to the unchanged base. Gate rows are fitted, never
                trained by gradients.
            growth: when to grow, and how; default `GrowthConfig()`.
            balance_coefficient: weight of the balance loss.

        Raises:
            ValueError: for a value out of range, a LoraConfig that cannot be routed, or a base that is
                no decoder-only causal language model. Whatever is raised, a loaded base stays as it was.
            BaseUnavailableError: when the base cannot be loaded.
        """
        if router is None:
            router = GrowingRouterConfig() if allow_expert_growth else RouterConfig()
        router = RouterConfig(**asdict(router))  # the defaults have been taken
        if router.per_response and router.turns is None:
            router = replace(router, turns=turns_of_base(base))
        if not allow_expert_growth and num_experts is None:
            num_experts = ExpertConfig.num_experts
        problems = pool_problems(
            router=router,
            names=names,
            num_experts=num_experts,
            shared_rank=shared_rank,
            shared_alpha=shared_alpha,
            allow_expert_growth=allow_expert_growth,
            growth=growth,
            balance_coefficient=balance_coefficient,
        )
        if problems:
            raise ValueError("DyLoRAMoE.from_base: " + "; ".join(problems))
        if isinstance(base, str):
            base = load_base(base)
        check_base(base)
        warn_of_changes(base)
        names = [f"expert_{index}" for index in range(num_experts or 0)] if names is None else list(names)
        for name in names:
            check_name(name, modules=(path for path, _ in base.named_modules()))
        if lora is None:
            lora = lora_config(ExpertConfig())
        with untouched_on_failure(base):
            noise = noise_problem(base)
            if noise is not None:
                raise ValueError(noise)
            seen = probe(base, router=router)
            lora, left_out = routed_lora_config(base, lora, router_index=seen.router_index, misfed=seen.misfed)
            shared = config_at(lora, shared_rank, alpha=shared_alpha, whose="pool") if shared_rank else None
            model = cls(
                base,
                seen=seen,
                lora=lora,
                router=router,
                names=names,
                balance_coefficient=balance_coefficient,
                shared=shared,
            )
            if allow_expert_growth:
                model.enable_growth(growth)
        model.left_out = left_out
        if left_out is not None:
            LOGGER.info("no expert adapts %s", left_out)
        LOGGER.info("%s has %s, on %s", cls.__name__, counted(len(names), "expert"), base.name_or_path or "its base")
        return model

    # The experts.

    def add_expert(self, name: str, *, rank: int | None = None, skill: str | None = None) -> Expert:
        """A new nascent expert with zero delta, and its gate row; routing is dense until it matures.

        No old expert and no old gate row changes. Everything stays as trainable as it was; see `freeze`.

        Args:
            name: letters, digits, '_' and '-'.
            rank: default the pool's; alpha follows, so that the scaling stays.
            skill: what it is for; kept in the checkpoint.

        Raises:
            ValueError: for a name or a rank that cannot be. Whatever is raised, the model stays as it was.
        """
        self._check_learned("add_expert")
        with self.whole_or_not_at_all():
            expert = self._pool.add(name, self._pool.config_for(rank), mature=False, skill=skill)
            self._pool.pack()
            self.router.add_row(name)
        return expert

    def import_expert(self, name: str, path: str, *, skill: str | None = None, **kwargs: Any) -> Expert:
        """Take a stock PEFT LoRA adapter into the pool: a folder or a hub id, written by PEFT 0.18 or newer.

        Rank, targets and scaling are the adapter's own; `with model.route_to(name)` gives its own logits. It
        comes in like an expert of `add_expert`: nascent, with a small random gate row, trainable. Its dropout
        becomes the pool's, because the experts of a layer share one mask.

        With granularity "response", aLoRA adapters whose invocation is in the header of an answer come in too, and a
        plain one with a warning: here the base reads what stands before the answer.

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
        taken = take_invocation(config, self.router_config)
        problems = taken.problems + lora_problems(
            self.base, config, router_index=self.seen.router_index, misfed=self.seen.misfed
        )
        if problems:
            raise ValueError(f"adapter {path} cannot be an expert: " + "; ".join(problems))
        with self.whole_or_not_at_all():
            expert = self._pool.load(name, config, state, path=path, skill=skill)
            self.router.add_row(name)
        if taken.difference is not None:
            warnings.warn(f"adapter {path}: {taken.difference}", DyLoRAWarning, stacklevel=2)
        return expert

    def _check_learned(self, what: str) -> None:
        if not self.router_config.is_learned:
            raise ValueError(
                f"{what} needs a gate that learns, and this router's policy is {self.router_config.policy!r}"
            )

    def mature(self, name: str) -> None:
        """An expert is done learning beside the others; with no nascent one left, routing is sparse."""
        self._pool[name].mature = True
        LOGGER.info("expert %s is mature: it routes as the others do", name)

    def remove_expert(self, name: str) -> list[str]:
        """Delete an expert, its gate row and its skills in the library; the others stay bit for bit.

        Returns:
            The names of these skills.

        Raises:
            ValueError: for an unknown expert, and while one is merged into the base.
        """
        check_unmerged(self.base, f"remove expert {name!r}")
        self._pool.remove(name)
        self.router.remove_row(name)
        self.apply_trainable()
        return [] if self.growth is None else self.growth.forget(name)

    def merge_experts(
        self, first: str, second: str, *, name: str | None = None, rank: int | None = None, seed: int = 0
    ) -> Merge:
        """Make one expert of two mature ones, which knows the skills of both; the others stay bit for bit.

        Its delta is the best approximation of rank `rank` of the mean of both deltas, weighted by the tokens that the
        library has seen of each; see `experts.merging`. The gate follows the library.

        Args:
            name: of the merged expert; default that of the first.
            rank: default the larger of the two ranks.
            seed: of the draws, where gate rows are frozen and the merged expert's is fitted.

        Raises:
            ValueError: where these two cannot be merged, or the library does not know their skills; nothing has
                changed then.
        """
        self._check_learned("merge_experts")
        if self.growth is None:
            raise ValueError(
                "this model has no skill library, so that nothing says what a merged expert is routed to; know_skill() "
                "first"
            )
        old = [self._pool[expert].name for expert in (first, second)]
        weights = self.growth.merge_weights(old)
        with self.whole_or_not_at_all():
            with torch.random.fork_rng(devices=[]):  # what PEFT and the router draw is overwritten
                merge = merge_experts(
                    self._pool, *old, weights=(weights[0], weights[1]), name=first if name is None else name, rank=rank
                )
                for expert in old:
                    self.router.remove_row(expert)
                self.router.add_row(merge.expert)
            self.growth.merge(old, merge.expert, seed=seed)
            self.apply_trainable()
        LOGGER.info("%s", merge.in_words(*old))
        return merge

    def freeze(self, *names: str) -> None:
        """Stop training these experts ("shared" is one) and their gate rows, whose gradients are dropped. `unfreeze`
        undoes it."""
        self._set_trainable(names, False)
        for name in names:
            row = () if name == SHARED else (self.router.gate[name], self.router.gate_bias[name])
            for parameter in (*self._pool.parameters(name), *row):
                parameter.grad = None

    def unfreeze(self, *names: str) -> None:
        """Train these experts and their gate rows again.

        Raises:
            ValueError: for the shared expert of a pool that grows, whose old experts would change with it.
        """
        if SHARED in names and self.allow_expert_growth:
            raise ValueError(
                f"expert {SHARED!r} is frozen while the pool grows, because what every old expert computes would "
                "change with it; fix_pool() first"
            )
        self._set_trainable(names, True)

    def _set_trainable(self, names: Sequence[str], trainable: bool) -> None:
        for expert in [self._pool.find(name) for name in names]:
            expert.trainable = trainable
        self.apply_trainable()

    # Routing.

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Routing:
        """The routing of these tokens; runs the base up to the router and no further.

        Args:
            input_ids: int64 [batch, seq].
            attention_mask: [batch, seq], 0 on padding.
            inputs: position_ids, prompt_lengths or labels, as in `forward`.
        """
        return self._hooks.read(input_ids=input_ids, attention_mask=attention_mask, **inputs).routing

    def routed_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Which tokens of a batch are routed: bool [batch, seq]. These are all that are not padding and, with response
        granularity, of them the answers; others go to the base alone. Nothing is run.

        Args:
            batch: input_ids [batch, seq] and, where padded or packed, attention_mask and position_ids.
        """
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        if not self.router_config.per_response:
            return mask
        starts = text_starts(batch.get("position_ids"), mask=mask)
        return find_answers(ids, mask=mask, turns=self.router_config.turns, starts=starts).tokens

    def router_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """What the gate reads of these tokens, whatever `route_to` asks for: fp32 [batch, seq, hidden].

        Args:
            inputs: as in `route`.
        """
        return cast(RouterState, self._read(input_ids, attention_mask, **inputs).states).mean

    @torch.no_grad()
    def _read(self, input_ids: Tensor, attention_mask: Tensor | None, **inputs: Any) -> ForwardContext:
        """What the router read of these tokens and, with response granularity, which answers it found."""
        with self._hooks.forcing(NotForced):
            context = self._hooks.read(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        if context.states is None:
            raise ValueError("an expert is merged into the base, so that the base alone cannot be read; unmerge it")
        return context

    def text_features(self, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
        """What the gate reads of each text, padding left out: fp32 [tokens, hidden] each, on the model's device.

        `text_states` also tells how many tokens each of these means stands on.

        Args:
            batches: each with input_ids [batch, seq] and, where padded, attention_mask; also position_ids, labels or
                prompt_lengths, as in `forward`.
        """
        return [states.mean for states in self.text_states(batches)]

    def text_states(self, batches: Iterable[dict[str, Tensor]]) -> list[RouterState]:
        """The router's memory after each token of each text: total [tokens, hidden], mass [tokens, 1], and where the
        router filters belief [tokens, members].

        With response granularity each answer counts as one text of one token: that at which it begins, and was decided.

        Args:
            batches: as for `text_features`.
        """
        texts: list[RouterState] = []
        for batch in batches:
            ids = batch["input_ids"].to(self.device)
            mask = batch.get("attention_mask", torch.ones_like(ids)).to(self.device).bool()
            given = {name: batch[name].to(self.device) for name in ROUTER_INPUTS if name in batch}
            read = self._read(ids, mask, **given)
            states = cast(RouterState, read.states)
            if read.answers is not None:
                row_N, place_N = read.answers.openings.nonzero(as_tuple=True)
                chosen = states.each(lambda part, at=(row_N, place_N): part[at][:, None])  # type: ignore[misc]
                texts += [chosen.each(lambda part, index=index: part[index]) for index in range(len(row_N))]  # type: ignore[misc]
                continue
            texts += [
                states.each(lambda part, row=row, real=real: part[row][real])  # type: ignore[misc]
                for row, real in enumerate(mask)
                if real.any()
            ]
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
        if not texts and self.router_config.per_response:
            raise ValueError(
                "initialize_router was given no text with an answer, as RouterConfig.turns finds them; with "
                "granularity='response' give conversations"
            )
        if len(texts) < len(self._pool):
            raise ValueError(
                f"initialize_router was given {counted(len(texts), 'text')} for "
                f"{counted(len(self._pool), 'expert')}; give more"
            )
        self.router.initialize(texts, seed=seed)

    # Growth: what each of these does, and its arguments, is written at the method of `Growth` that it calls.

    def enable_growth(self, config: GrowthConfig | None = None, *, seed: int = 0) -> None:
        """Let `add_skill` grow the pool from here on; see `Growth.enable`. A shared expert goes on serving all, and is
        frozen, so that old experts stay as they are."""
        self._check_learned("enable_growth")
        with self.whole_or_not_at_all():
            growth = self._growth_or_new()
            growth.enable(config, seed=seed)
            self.growth = growth
            if self._pool.shared is not None:
                self.freeze(SHARED)
            self.apply_trainable()

    def fix_pool(self, config: GrowthConfig | None = None) -> None:
        """Let `add_skill` report new data from here on, and add no expert; see `Growth.fix`."""
        self.growth = self._growth_or_new()
        self.growth.fix(config)
        self.apply_trainable()

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

        See `Growth.add_skill`. What remains is to train, with `route_to(decision.expert)` around the forward so that
        all tokens teach that expert, and then `mature(decision.expert)`. Until then routing is dense.
        """
        self._check_learned("add_skill")
        if self.growth is None:
            raise ValueError("this model has no skill library, so that nothing can be said to be new; enable_growth()")
        with self.whole_or_not_at_all():
            decision = self.growth.add_skill(name, batches, rank=rank, expert=expert, seed=seed)
            if decision.expert is not None:
                changed = [other for other in self._pool.everyone if other.trainable != (other.name == decision.expert)]
                for other in changed:
                    other.trainable = not other.trainable
                self.apply_trainable([other.name for other in changed])
        LOGGER.info("%s", decision.in_words(name))
        return decision

    def know_base(self, batches: Iterable[dict[str, Tensor]], *, seed: int = 0) -> None:
        """Tell the library which text should stay with the unchanged base; see `Growth.know_base`."""
        growth = self._growth_or_new()
        growth.know_base(batches, seed=seed)
        self.growth = growth

    def know_skill(self, name: str, batches: Iterable[dict[str, Tensor]], *, seed: int = 0) -> str:
        """Tell the library of a skill that the pool has already; see `Growth.know_skill`."""
        growth = self._growth_or_new()
        expert = growth.know_skill(name, batches, seed=seed)
        self.growth = growth
        return expert

    @property
    def library(self) -> SkillLibrary:
        """The statistics of each known skill.

        Raises:
            ValueError: where nothing is known: the pool was not grown, and was told nothing.
        """
        if self.growth is None:
            raise ValueError("this model has no skill library; enable_growth() begins one")
        return self.growth.library

    def knows(self, skill: str) -> bool:
        """Whether the library has a skill of that name."""
        return self.growth is not None and skill in self.growth.library.skills

    def _growth_or_new(self) -> Growth:
        return Growth(self) if self.growth is None else self.growth

    # Checkpoints.

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the folder that docs/checkpoints.md describes: experts, router, and how to check them.

        Args:
            save_directory: a new folder, or an older checkpoint of ours, which is replaced. The Trainer's own
                folders may also hold what it puts there.

        Raises:
            ValueError: for a folder that holds other files, or an option of PEFT's that cannot apply.
        """
        if not kwargs.pop("is_main_process", True):
            return
        refused = [name for name, value in kwargs.items() if name != "state_dict" or value is not None]
        if refused:
            raise ValueError(f"save_pretrained takes only the folder; {', '.join(sorted(refused))} cannot apply")
        save_checkpoint(self, save_directory, beside="state_dict" in kwargs)  # which only the Trainer passes

    def load_adapter(self, model_id: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Put a checkpoint of this very model into it, as the stock Trainer asks for its best one, or to resume.

        Raises:
            CheckpointError: for a checkpoint that is not whole, or of another model, which stays as it was.
            ValueError: for any other folder, for an adapter needs a gate row. Use `import_expert`.
        """
        if not (Path(model_id) / MANIFEST).is_file():
            super().load_adapter(model_id, *args, **kwargs)
        load_into(self, model_id)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str, base: PreTrainedModel | str | None = None, **kwargs: Any
    ) -> DyLoRAMoE:
        """Read a checkpoint folder back, bit for bit, after checking every file and the base.

        Args:
            path: the folder, or that of a run or a stream that has ended.
            base: the base model, loaded or by name; None: the one that the checkpoint names.
            kwargs: passed on to load the base (for example dtype).

        Raises:
            CheckpointError: for a missing, extra, altered or misshapen file, or another base.
        """
        return load_checkpoint(cls, path, base, **kwargs)
