"""A part of families.py: one family's tiny base, the texts it is tried on, and routed models on it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from peft import LoraConfig
from tiny_configs import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe import DyLoRAMoE, RouterConfig

PROMPTS, NEW = (9, 3, 6), 8
"""Tokens of each row's prompt, and of its continuation: longer than any window of a tiny config."""

BOUND = 2e-5
"""The largest difference that is taken for rounding, over the largest logit."""


class Broken(Exception):
    """A law does not hold: the message says how."""


class Family:
    """One family's tiny base, tried law by law.

    Args:
        name: of the family in Transformers' table.
        changes: what `tiny_model` takes.
    """

    def __init__(self, name: str, **changes: Any) -> None:
        self.name, self.changes = name, changes
        # On a CPU the last bits may differ where weights learn; and some bases keep something of their last forward.
        self._unused = tiny_model(name, **changes).requires_grad_(False)
        self.base = self.fresh()
        self.ids, self.mask = rows([length + NEW for length in PROMPTS])
        parameters = inspect.signature(self.base.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.inputs = {*parameters, *(["attention_mask"] if takes_any else [])}
        """What the base takes; a mask that it passes over still says to the router what is padding."""
        try:
            self.whole(self.base, self.ids, self.mask)
        except Exception:  # a base that cannot take positions itself
            self.inputs.discard("position_ids")
        self.linears = ""
        """How many of its linears carry experts, in words."""
        self.notes: list[str] = []

    def fresh(self) -> PreTrainedModel:
        """The base again, the same values, before any forward."""
        return copy.deepcopy(self._unused)

    def routed(self, base: PreTrainedModel | None = None, **router: Any) -> DyLoRAMoE:
        """A routed model with experts and a gate that are far from zero."""
        torch.manual_seed(1)
        model = DyLoRAMoE.from_base(
            self.fresh() if base is None else base,
            num_experts=3,
            lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"),
            router=RouterConfig(**{"router_half_life": 1.0, **router}),
        )
        return scramble(model).eval()

    def given(self, **inputs: Any) -> dict[str, Any]:
        """Those of the inputs that the base knows."""
        return {name: value for name, value in inputs.items() if name in self.inputs}

    @torch.no_grad()
    def whole(self, model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The logits of one forward without a cache."""
        placed = {} if mask is None else {"position_ids": positions(mask)}
        return model(**self.given(input_ids=ids, attention_mask=mask, use_cache=False, **placed)).logits

    def has_loss(self) -> bool:
        """Whether the plain base computes a loss of text; a note says why not."""
        try:
            self.base.train()(**self.labelled())
        except Exception as error:  # of the base alone
            self.notes.append(f"the base computes no loss of text alone: {one_line(error)}")
            return False
        finally:
            self.base.eval()
        return True

    def labelled(self) -> dict[str, Tensor]:
        """A batch to train on."""
        labels = self.ids.masked_fill(self.mask == 0, -100)
        return {"input_ids": self.ids, "attention_mask": self.mask, "labels": labels}


def rows(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(ids, mask) of random rows, padded on the left."""
    width = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        ids[row, width - length :] = torch.randint(3, 80, (length,), generator=generator)
        mask[row, width - length :] = 1
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """The positions that `generate` gives to the tokens of such a mask."""
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def scramble(model: DyLoRAMoE) -> DyLoRAMoE:
    """Random experts, and a gate that sends neighbouring tokens to different ones."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=0.2)
    for row in model.router.gate.values():
        row.normal_(std=6.0)
    # Without their common part, features choose every expert for a fair part of the tokens.
    model.router.feature_mean.copy_(model.router_features(torch.randint(3, 80, (4, 64))).mean((0, 1)))
    return model


def difference(ours: Tensor, theirs: Tensor, *, bound: float = BOUND) -> float:
    """The largest difference over the largest entry; raises Broken where it is above the bound."""
    if ours.shape != theirs.shape:
        raise Broken(f"shapes {list(ours.shape)} and {list(theirs.shape)}")
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise Broken("values that are not finite")
    found = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-3))
    if found > bound:
        raise Broken(f"differs by {found:.1g} of the largest value")
    return found


def one_line(error: Exception) -> str:
    """The error without its line breaks, cut where it is long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
