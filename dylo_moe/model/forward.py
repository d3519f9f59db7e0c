"""The forward of a routed model: where its tokens are routed, and how its loss is computed."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dylo_moe.model.generation import GenerateCall
from dylo_moe.model.loss import add_router_losses, check_plain_head, chunked_loss, smoothed_loss
from dylo_moe.model.nonfinite import blame_nan
from dylo_moe.model.output import DyLoRAMoEOutput
from dylo_moe.model.peft_model import RoutedPeftModel
from dylo_moe.routing.forward_context import ForwardContext


class RoutedForward(RoutedPeftModel):
    """A `RoutedPeftModel` that computes: one routed forward, its losses, and generation."""

    _loss_chunk_size: int | None = None

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
            num_tokens_in_batch: routed tokens of the whole optimizer step (see `routed_tokens`), which the router's
                losses are divided by. Where only `num_items_in_batch` is known, they are taken over the predicted
                tokens; where neither is, over the routed tokens of this batch.
            prompt_lengths: int64 [batch], in real tokens; with sequence granularity, where each row's prompt
                ends. None: before its first label that is not -100, else at its 32nd real token.
            label_smoothing: from 0 to below 1; this part of each label is spread evenly over the vocabulary
                (Szegedy et al. 2015, arXiv:1512.00567, section 7). It enters `loss`; `lm_loss` stays plain.
            kwargs: passed on to the base. Where `position_ids` start over within a row, another text begins,
                whose routing does not see the one before.
        """
        self._check_options(kwargs, prompt_lengths, label_smoothing)
        count = None if labels is None else _label_count(labels, num_items_in_batch)
        chunk_size = None if labels is None else self._chunk_size(kwargs)
        if labels is not None:
            kwargs["num_items_in_batch"] = count
            kwargs.setdefault("use_cache", False)  # with a cache, Transformers lets packed texts see each other
        # The base's own forward. As its first routed layer begins, the hooks read the hidden states that enter it, and
        # put the routing of every token into `context`, where all routed linears from there on find it.
        context = ForwardContext(labels=labels, prompt_lengths=prompt_lengths, skips_head=chunk_size is not None)
        out = self._hooks.run(
            context,
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels if chunk_size is None else None,
            return_dict=True,
            **kwargs,
        )
        context.states = context.remembered = None  # as large as hidden states, and nothing reads them any more
        result = out  # of TRL's or Liger's fused head: log-probabilities of the labels, or their loss, and no logits
        if "logits" in out:
            result = DyLoRAMoEOutput(
                logits=out.logits if chunk_size is None else None,
                past_key_values=out.get("past_key_values"),
                cache_params=out.get("cache_params"),
                hidden_states=out.get("hidden_states"),
                attentions=out.get("attentions"),
            )
        result.routing = context.routing
        if labels is not None and count is not None:
            if chunk_size is None:
                result.loss, result.lm_loss = smoothed_loss(out, labels, count, label_smoothing=label_smoothing)
            else:
                self._add_chunked_loss(result, context, chunk_size, count, label_smoothing)
            if self.training and context.routing.logits is not None:
                self.router.observe(context.routing)
            add_router_losses(
                result,
                self.router,
                labels=labels,
                balance_coefficient=self.balance_coefficient,
                num_items=num_items_in_batch,
                num_tokens=num_tokens_in_batch,
            )
        return result if return_dict is not False else result.to_tuple()

    def _check_options(self, kwargs: dict[str, Any], prompt_lengths: Tensor | None, label_smoothing: float) -> None:
        """Refuse what has no meaning here, and drop what trainers ask for that is always given."""
        if "adapter_names" in kwargs:
            raise ValueError("adapter_names has no meaning for a routed model; use `with model.route_to([...]):`")
        if prompt_lengths is not None and not self.router_config.per_sequence:
            raise ValueError(
                f"prompt_lengths has no meaning with granularity={self.router_config.granularity!r}; only 'sequence' "
                "asks where a row's prompt ends"
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing!r}; it must be from 0 to below 1")
        kwargs.pop("output_router_logits", None)  # how TRL asks for aux_loss, which is always there

    def _chunk_size(self, kwargs: dict[str, Any]) -> int | None:
        """Tokens whose logits exist at once in this forward; None: all. The caller may say how the loss is computed."""
        if kwargs.get("fused_lm_head") or kwargs.get("shift_labels") is not None:
            return None
        if self._loss_chunk_size is not None:
            kwargs.pop("skip_logits", None)  # how the Trainer asks Liger's kernels for what is done here
        return self._loss_chunk_size

    def _add_chunked_loss(
        self, result: Any, context: ForwardContext, chunk_size: int, count: Tensor, label_smoothing: float
    ) -> None:
        hidden, labels = cast(Tensor, context.head_input), cast(Tensor, context.labels)
        head = cast(nn.Linear, self.base.get_output_embeddings())
        losses = chunked_loss(hidden, head, labels, chunk_size=chunk_size, label_smoothing=label_smoothing)
        lost = hidden.isnan().any(-1) | losses.plain.isnan()
        blame_nan(context.routing, lost, mask=context.mask, base=self.base, pool=self._pool, router=self.router)
        count = count.to(hidden.device)
        result.loss = losses.trained.sum() / count
        result.lm_loss = losses.plain.sum() / count if label_smoothing > 0 else result.loss
        result.token_losses = losses.plain

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, cached, with every row and every token routed on its own.

        With sequence granularity each row is decided on its prompt, once; a cache that is passed in and was
        decided already keeps its decision. With `return_dict_in_generate=True` and a prompt of ids, the result
        also has `.routing`, of every token of `sequences`.

        With response granularity the result also has `.turns`, the answers of each row and who wrote them, and
        `route_to` names who writes the answer that is open at the prompt's end, and what follows; what stands before
        it stays as the router sends it.

        Raises:
            ValueError: for a router that reads the last hidden states and decides token by token; for
                compiled decoding, which does not exist yet.
        """
        call = GenerateCall(args, kwargs, defaults=self.base.generation_config)
        call.check(self._hooks)
        call.leave_foreign_state(self._hooks)
        with self._hooks.generating(call.prompt(self._hooks)):
            output = super().generate(*args, **call.keywords)
            call.finish(self._hooks, output)
        return output


def _label_count(labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """What the language-model loss is divided by, at least 1: no label at all is a loss of 0, not of nan."""
    count = (labels[:, 1:] != -100).sum() if num_items is None else num_items
    return torch.as_tensor(count).clamp_min(1)
