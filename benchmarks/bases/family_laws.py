"""A part of families.py: the laws that a routed model on a base must keep, and what became of them on one family."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cached_decoding import check_decoding, exact_ways
from peft import PeftModel
from safetensors.torch import load_file
from tiny_configs import tiny_config, tiny_model
from tiny_family import Broken, Family, difference, one_line
from transformers.pytorch_utils import Conv1D

import dylo_moe
from dylo_moe import DyLoRAMoE

PASS, REFUSED, LATE, WRONG, TRACEBACK = "passes", "refused", "refused late", "WRONG", "TRACEBACK"
UNTRIED = "not tried"

LINEARS, NOTE = "linears", "note"
"""What stands for no law: how many linears carry experts, and what there is to say."""


@dataclasses.dataclass
class Outcome:
    """What became of one law: a kind, how large the difference was, and what there is to say."""

    law: str
    kind: str
    difference: float | None = None
    message: str = ""


# The laws.


def causal(family: Family) -> float:
    """With the defaults, a later token changes nothing before it."""
    model, ids = DyLoRAMoE.from_base(family.fresh()).eval(), family.ids[:1].clone()
    before = family.whole(model, ids, None)[:, :-1]
    ids[:, -1] = (ids[:, -1] + 7) % 70 + 5
    return difference(family.whole(model, ids, None)[:, :-1], before)


def zero_delta(family: Family) -> float:
    """With the defaults, bit for bit."""
    model = DyLoRAMoE.from_base(family.fresh()).eval()
    linears = [module for module in family.base.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    family.linears = f"{len(model.experts.layers)} of {len(linears)}"
    ours = family.whole(model, family.ids, family.mask)
    return difference(ours, family.whole(family.base, family.ids, family.mask), bound=0.0)


def stock_peft(family: Family) -> float:
    """Each saved expert in stock PEFT gives the logits of `route_to`, and stock PEFT writes the same file again."""
    model, worst = family.routed(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for expert in model.experts:
            source = Path(folder) / "experts" / expert.name
            stock = PeftModel.from_pretrained(family.fresh(), str(source)).eval()
            with model.route_to(expert.name):
                ours = family.whole(model, family.ids, family.mask)
            worst = max(worst, difference(ours, family.whole(stock, family.ids, family.mask)))
            again = Path(folder) / "again"
            stock.save_pretrained(str(again))
            ours_file, theirs = (load_file(path / "adapter_model.safetensors") for path in (source, again))
            if ours_file.keys() != theirs.keys() or any(not torch.equal(ours_file[k], theirs[k]) for k in theirs):
                raise Broken(f"{expert.name}: stock PEFT writes another adapter than it read")
    return worst


def cached(family: Family, **router: Any) -> float | None:
    """In the ways in which the plain base's own decoding is exact; None where there are none."""
    exact = exact_ways(family)
    if not exact:
        return None
    model = family.routed(**router)
    weights = model.route(family.ids, family.mask).weights[family.mask.bool()]
    if int((weights.std(0) > 0.05).sum()) < 2:
        raise Broken("all tokens go to one expert, so that nothing was tried")
    return check_decoding(family, model, exact)


def cached_deeper(family: Family) -> float | None:
    return cached(family, router_layer=1)


def round_trip(family: Family) -> float:
    """A saved and loaded model gives the same logits, bit for bit."""
    model = family.routed()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = DyLoRAMoE.from_pretrained(folder, base=family.fresh()).eval()
    before, after = (family.whole(each, family.ids, family.mask) for each in (model, again))
    return difference(after, before, bound=0.0)


def training(family: Family) -> float | None:
    """The loss falls, through experts and gate alone."""
    if not family.has_loss():
        return None
    base = family.fresh()
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = family.routed(base).train()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    strange = [name for name in learning if ".lora_" not in name and not name.startswith("router.")]
    if strange:
        raise Broken(f"{strange[0]} is trainable")
    optimizer, losses = torch.optim.AdamW(learning.values(), lr=3e-3), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**family.labelled()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    if losses[-1] >= losses[0]:
        raise Broken(f"the loss goes from {losses[0]:.4f} to {losses[-1]:.4f}")
    if not any(p.grad is not None and p.grad.any() for name, p in learning.items() if name.startswith("router.")):
        raise Broken("the gate has no gradient")
    held = {name.replace(".base_layer.", "."): t for name, t in model.base.state_dict().items() if ".lora_" not in name}
    changed = [name for name, tensor in frozen.items() if not torch.equal(held[name], tensor)]
    if changed:
        raise Broken(f"{changed[0]} of the base changed")
    return 0.0


def checkpointing(family: Family) -> float | None:
    """The same loss and gradients."""
    if not family.base.supports_gradient_checkpointing:
        family.notes.append("the base has no gradient checkpointing")
        return None
    if not family.has_loss():
        return None
    found = []
    for switched_on in (False, True):
        model = family.routed().train()
        if switched_on:
            model.gradient_checkpointing_enable()
        loss = model(**family.labelled()).loss
        loss.backward()
        parts = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found.append(torch.cat([loss.detach()[None], *parts]))
    return difference(found[1], found[0], bound=1e-4)


def dropouts(config: Any) -> dict[str, Any]:
    """Every dropout and jitter of a config, on; those of configs inside it under names with dots."""
    found: dict[str, Any] = {}
    config.allow_global_per_layer_attribute_access = True
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": rate for name, rate in dropouts(value).items()}
        elif ("drop" in field.name or "jitter" in field.name) and type(value) in (int, float):
            found[field.name] = 0.3
    return found


def no_dropout(family: Family) -> float | None:
    """Two forwards in training mode are equal, on a base whose own dropout and jitter are on."""
    rates = dropouts(tiny_config(family.name, **{k: v for k, v in family.changes.items() if k != "wrapper"}))
    inputs = {"input_ids": family.ids, "attention_mask": family.mask, "use_cache": False}
    try:
        base = tiny_model(family.name, **family.changes, **rates)
        copy.deepcopy(base).train()(**family.given(**inputs))
    except Exception as error:  # of the base alone
        family.notes.append(f"the base cannot be trained with its dropout on: {one_line(error)}")
        return None
    model = family.routed(base).train()
    with torch.no_grad():
        first, second = (model(**family.given(**inputs)).logits for _ in range(2))
    return difference(second, first, bound=0.0)


LAWS: dict[str, Callable[[Family], float | None]] = {
    "causal": causal,
    "B = 0 is the base": zero_delta,
    "one expert is stock PEFT": stock_peft,
    "cached = uncached": cached,
    "cached = uncached, router at layer 1": cached_deeper,
    "round trip": round_trip,
    "training": training,
    "gradient checkpointing": checkpointing,
    "no dropout": no_dropout,
}


def try_family(name: str, **changes: Any) -> Iterator[Outcome]:
    """Each law's outcome; one alone where the base is refused, or cannot be made here."""
    try:
        family = Family(name, **changes)
        family.whole(family.base, family.ids, family.mask)
    except Exception as error:
        yield Outcome("base", UNTRIED, message=where(error))
        return
    refusal = refused(family)
    if refusal is not None:
        yield refusal
        return
    for law, holds in LAWS.items():
        try:
            yield Outcome(law, PASS, difference=holds(family))
        except Broken as broken:
            yield Outcome(law, WRONG, message=str(broken))
        except Exception as error:
            yield judged(law, error)
    yield Outcome(LINEARS, PASS, message=family.linears)
    for note in dict.fromkeys(family.notes):
        yield Outcome(NOTE, PASS, message=note)


def refused(family: Family) -> Outcome | None:
    """The outcome of `from_base` where it raises."""
    base = family.fresh()
    try:
        DyLoRAMoE.from_base(base)
    except Exception as error:
        outcome = judged("from_base", error)
        if outcome.kind == LATE:
            outcome.kind = REFUSED
        if base.state_dict().keys() != family.base.state_dict().keys():
            outcome.message += " (and the base keeps adapters)"
            outcome.kind = WRONG
        return outcome
    return None


def judged(law: str, error: Exception) -> Outcome:
    """A ValueError that this package raises itself is a refusal; anything else is a bug of somebody."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(dylo_moe.__file__).parent
    if isinstance(error, ValueError) and Path(last).is_relative_to(ours):
        return Outcome(law, LATE, message=one_line(error))
    return Outcome(law, TRACEBACK, message=where(error))


def where(error: Exception) -> str:
    """The error and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{one_line(error)} ({'/'.join(Path(last.filename).parts[-2:])}:{last.lineno})"
