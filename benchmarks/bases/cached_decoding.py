"""A part of families.py: decoding with a cache, three ways, against one forward over the whole text."""

from __future__ import annotations

from typing import Any

import torch
from tiny_family import NEW, Broken, Family, difference, one_line, positions
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

WAYS = [f"{batch}, {how}" for batch in ("padded", "alone") for how in ("dictated", "by hand", "greedy")]
"""A batch padded on the left, or one row; a text that `generate` is made to write, one forward for each token with the
cache of the last, and what `generate` writes by itself."""


class Dictation(LogitsProcessor):
    """Lets `generate` write a given text, [batch, tokens]."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.text[:, input_ids.shape[1]]
        return torch.full_like(scores, -1e4).scatter(1, chosen[:, None], 0.0)


def dictated(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits from which `generate` would choose each of the last NEW tokens, with its cache."""
    start = ids.shape[1] - NEW
    out = model.generate(
        input_ids=ids[:, :start],
        attention_mask=mask[:, :start],
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        logits_processor=LogitsProcessorList([Dictation(ids)]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits, 1).float()


@torch.no_grad()
def by_hand(family: Family, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The same logits, one forward for each token, with the cache of the last."""
    cache, logits, start, places = None, [], ids.shape[1] - NEW, positions(mask)
    for begin, end in [(0, start), *((place, place + 1) for place in range(start, ids.shape[1] - 1))]:
        inputs = family.given(
            input_ids=ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=places[:, begin:end],
            past_key_values=cache,
            use_cache=True,
        )
        out = model(**inputs)
        cache = out.past_key_values
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1).float()


def check_greedy(family: Family, model: Any, ids: Tensor, mask: Tensor) -> None:
    """Raise Broken where `generate` writes other tokens than everything computed anew for each token."""
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=True)
    for _ in range(NEW):
        new = family.whole(model, ids, mask)[:, -1].argmax(-1)
        ids, mask = torch.cat([ids, new[:, None]], 1), torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    if not torch.equal(made, ids):
        raise Broken("other tokens")


def check_decoding(family: Family, model: Any, ways: list[str]) -> float:
    """The largest difference between decoding with a cache, in these of the WAYS, and without; raises Broken."""
    worst = 0.0
    for way in ways:
        batch, how = way.split(", ")
        ids, mask = (family.ids, family.mask) if batch == "padded" else (family.ids[:1], family.mask[:1])
        start = ids.shape[1] - NEW
        try:
            if how == "greedy":
                check_greedy(family, model, ids[:, :start], mask[:, :start])
                continue
            expected = family.whole(model, ids, mask)[:, start - 1 : -1].float()
            found = by_hand(family, model, ids, mask) if how == "by hand" else dictated(model, ids, mask)
            worst = max(worst, difference(found, expected))
        except Broken as broken:
            raise Broken(f"{way}: {broken}") from None
    return worst


def exact_ways(family: Family) -> list[str]:
    """The ways in which the plain base's own cached decoding is exact; notes say which are not, and which fail."""
    exact, inexact, failing = [], [], {}
    for way in WAYS:
        try:
            check_decoding(family, family.base, [way])
            exact.append(way)
        except Broken:
            inexact.append(way)
        except Exception as error:  # of the base alone
            failing[way] = one_line(error)
    if inexact:
        which = "" if not exact else f" where it is {' or '.join(inexact)}"
        family.notes.append(f"the base's own cached decoding is inexact{which}")
    if "alone, greedy" in failing:  # a base without a cache to hand on is usual
        family.notes.append(f"the base's own generate fails: {failing['alone, greedy']}")
    return exact
