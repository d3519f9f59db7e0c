"""Measure held-out losses of each dataset, in nats per token, with intervals, and their difference from the base's.

The summed loss and the number of predicted tokens are kept for every row. All figures follow from these by pure
functions, so the losses of several runs can be compared and pooled long after the runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.collator import Collator
from dylo_moe.evaluation.held_out import HeldOut
from dylo_moe.evaluation.intervals import Interval, percentile_interval, resampled_means
from dylo_moe.model.loss import chunk_loss
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import BASE
from dylo_moe.training.metrics import token_losses
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Cell, Table
from dylo_moe.utils.words import counted

DOCUMENTS = "documents"

ROWS = "rows"


class NotFinite(ValueError):
    """Raised for a model whose loss is not finite."""


class DatasetLosses(NamedTuple):
    """One model's losses on one dataset's held-out rows; the three lists go together."""

    documents: list[str]
    """The document that each row belongs to."""
    sums: list[float]
    """The summed loss of each row's predicted tokens, in nats."""
    tokens: list[int]
    """The number of predicted tokens of each row."""


Losses = dict[str, DatasetLosses]
"""The losses of one model, by dataset."""


class Estimate(NamedTuple):
    """A mean loss, or difference of losses, in nats per token, with its interval."""

    value: float
    interval: Interval
    num_units: int
    unit: str
    """The units that were resampled: "documents", or "rows" if there are fewer than two documents."""

    def as_json(self) -> dict[str, Any]:
        """The values as JSON has them."""
        return {**self._asdict(), "interval": self.interval.as_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Estimate:
        """The estimate that `as_json` wrote."""
        return cls(**{**values, "interval": Interval(*(values["interval"] or (math.nan, math.nan)))})


class Estimates(NamedTuple):
    """The estimate for each dataset, and for the mean over datasets, in which each counts the same."""

    datasets: dict[str, Estimate]
    mean: Estimate

    def as_json(self) -> dict[str, Any]:
        """The values as JSON has them."""
        return {"datasets": {name: item.as_json() for name, item in self.datasets.items()}, "mean": self.mean.as_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Estimates:
        """The estimates that `as_json` wrote."""
        datasets = {name: Estimate.from_json(item) for name, item in values["datasets"].items()}
        return cls(datasets, Estimate.from_json(values["mean"]))


# Measuring.


@torch.no_grad()
def measure(
    model: DyLoRAMoE,
    held: HeldOut,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    screen: Screen | None = None,
    what: str = "the model",
) -> Losses:
    """Measure the loss of every held-out row, with the model's current routing. The model is left as it was.

    Args:
        held: the held-out rows.
        tokenizer: the tokenizer of the model's base.
        batch_size: the number of rows in one forward; rows are sorted by length, so that little is padding.
        screen: where progress is shown; None: it is not shown.
        what: what is measured, such as "the base", in the line about the progress.

    Raises:
        NotFinite: for a loss that is not finite, naming the dataset.
    """
    collator = Collator(tokenizer)
    found = {}
    with _evaluating(model):
        for name, rows in held.rows.items():
            order = np.argsort(np.asarray(rows["length"]), kind="stable")
            sums, tokens = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
            title = f"evaluating {what} on {name}, in rows"
            with nullcontext(_say_nothing) if screen is None else screen.counting(title, len(rows)) as advance:
                for start in range(0, len(rows), batch_size):
                    places = order[start : start + batch_size]
                    sums[places], tokens[places] = _row_losses(model, collator([rows[int(place)] for place in places]))
                    advance(len(places))
            if not np.isfinite(sums).all():
                raise NotFinite(f"the loss of {(~np.isfinite(sums)).sum()} held-out rows of {name!r} is not finite")
            seen = np.flatnonzero(tokens)
            documents = [held.documents[name][place] for place in seen]
            found[name] = DatasetLosses(documents, sums[seen].tolist(), tokens[seen].tolist())
    return found


def _say_nothing(count: int) -> None:
    pass


def _row_losses(model: DyLoRAMoE, batch: dict[str, torch.Tensor]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The summed loss and the number of predicted tokens of each row of a batch."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "domain"}
    labels = batch["labels"]
    losses = token_losses(model(**batch), labels)
    return losses.double().sum(1).cpu().numpy(), (labels[:, 1:] != -100).sum(1).cpu().numpy()


@contextmanager
def _evaluating(model: DyLoRAMoE) -> Iterator[None]:
    """Put the model in eval mode for a while, and compute its loss in chunks if its vocabulary is large."""
    was_training, chunk_size = model.training, model.loss_chunk_size
    model.eval()
    chunk_loss(model, None)
    try:
        yield
    finally:
        model.train(was_training)
        model.loss_chunk_size = chunk_size


# Figures that follow from the measured losses.


def estimates(runs: Sequence[Losses], minus: Sequence[Losses] | None = None, *, seed: int) -> Estimates:
    """Estimate the mean losses over several runs, or the paired differences from other runs on the same rows.

    Every token of a dataset counts the same, over all runs. Documents are resampled, within each run; rows are
    resampled instead if some run has fewer than two documents.

    Args:
        runs: the losses of one or more runs, each on rows of its own seed.
        minus: the losses of as many runs, which are subtracted; each is on the same rows as its partner in `runs`.
        seed: the seed of the resampling.

    Raises:
        ValueError: for runs on different datasets, or on other rows than their partner's.
    """
    if minus is not None:
        runs = [_difference(*pair) for pair in zip(runs, minus, strict=True)]
    names = list(runs[0])
    if any(list(run) != names for run in runs):
        raise ValueError(
            f"the runs were evaluated on different datasets: {', '.join(' and '.join(run) for run in runs)}"
        )
    found, means, sizes = {}, [], []
    for place, name in enumerate(names):
        units = _units([run[name] for run in runs])
        means.append(resampled_means(units.values, units.weights, strata=units.strata, seed=seed + place))
        value = float(np.average(units.values, weights=units.weights))
        interval = percentile_interval(means[-1], sizes=units.sizes)
        found[name] = Estimate(value, interval, len(units.values), units.unit)
        sizes += units.sizes
    value = float(np.mean([item.value for item in found.values()]))
    kinds = {item.unit for item in found.values()}
    interval = percentile_interval(np.mean(means, 0), sizes=sizes)
    return Estimates(
        found, Estimate(value, interval, sum(sizes), kinds.pop() if len(kinds) == 1 else "documents or rows")
    )


def mean_loss(losses: Losses) -> float:
    """The mean over datasets of the loss per token."""
    return float(np.mean([sum(item.sums) / sum(item.tokens) for item in losses.values()]))


class _Units(NamedTuple):
    """The units of one dataset that are resampled, over all runs, as arrays [N]."""

    values: NDArray[np.float64]
    """The mean loss of each unit, in nats per token."""
    weights: NDArray[np.float64]
    """The number of tokens of each unit."""
    strata: NDArray[np.int64]
    """The run that each unit comes from."""
    sizes: list[int]
    unit: str


def _units(runs: Sequence[DatasetLosses]) -> _Units:
    unit = DOCUMENTS if all(len(set(run.documents)) > 1 for run in runs) else ROWS
    values, weights, strata, sizes = [], [], [], []
    for place, run in enumerate(runs):
        tokens = np.asarray(run.tokens, np.float64)
        group = np.arange(len(tokens))
        if unit == DOCUMENTS:
            group = np.unique(run.documents, return_inverse=True)[1]
        weights.append(np.bincount(group, tokens))
        values.append(np.bincount(group, run.sums) / weights[-1])
        sizes.append(len(weights[-1]))
        strata.append(np.full(sizes[-1], place))
    return _Units(np.concatenate(values), np.concatenate(weights), np.concatenate(strata), sizes, unit)


def _difference(run: Losses, minus: Losses) -> Losses:
    """The losses of one run minus those of another, row by row."""
    if list(run) != list(minus) or any(
        (one.documents, one.tokens) != (other.documents, other.tokens)
        for one, other in zip(run.values(), minus.values(), strict=True)
    ):
        raise ValueError("two runs were not evaluated on the same held-out rows, so their losses cannot be compared")
    return {
        name: one._replace(sums=(np.asarray(one.sums) - np.asarray(minus[name].sums)).tolist())
        for name, one in run.items()
    }


def to_json(losses: Losses) -> dict[str, Any]:
    """Turn losses into plain values for a file."""
    return {name: item._asdict() for name, item in losses.items()}


def from_json(content: Mapping[str, Any]) -> Losses:
    """Read losses from the plain values that `to_json` made."""
    return {name: DatasetLosses(**item) for name, item in content.items()}


# The command.


def run_losses(
    model: DyLoRAMoE,
    tokenizer: PreTrainedTokenizerBase,
    held: HeldOut,
    *,
    batch_size: int,
    expert: str | None,
    seed: int,
    screen: Screen,
) -> dict[str, Any]:
    """Measure the held-out losses of a model and of its base, and return them as plain values; `show_losses` prints
    them.

    Args:
        tokenizer: the tokenizer of the model's base.
        held: the held-out rows.
        batch_size: the number of rows in one forward.
        expert: the expert that every token is sent to, or "base" for the unchanged base; None: the router decides.
        seed: the seed of the resampling.
        screen: where progress is shown.

    Raises:
        ValueError: for an unknown expert, and as `measure` does.
    """
    with nullcontext() if expert is None else model.route_to(None if expert == BASE else expert):
        what = {None: "the model", BASE: "the base"}.get(expert, expert)
        ours = measure(model, held, tokenizer, batch_size=batch_size, screen=screen, what=str(what))
    with model.route_to(None):
        is_same = expert == BASE
        base = (
            ours if is_same else measure(model, held, tokenizer, batch_size=batch_size, screen=screen, what="the base")
        )
    found = {
        "model": estimates([ours], seed=seed),
        "base": estimates([base], seed=seed),
        "difference": estimates([ours], [base], seed=seed),
    }
    tokens = {name: sum(item.tokens) for name, item in ours.items()}
    rows = {name: len(item.tokens) for name, item in ours.items()}
    return {
        "unit": "nats per token",
        "level": 0.95,
        "expert": expert,
        "num_tokens": tokens,
        "num_rows": rows,
        "notes": held.notes,
        **{kind: item.as_json() for kind, item in found.items()},
    }


def show_losses(screen: Screen, result: dict[str, Any]) -> None:
    """Print what `run_losses` returned: a table with a line for each dataset, and one for the mean, and the notes."""
    columns = ["dataset", "the base", result["expert"] or "the model", "difference", "resampled"]
    table = Table("held-out loss, nats per token, with 95 % intervals", columns)
    model, base, difference = (Estimates.from_json(result[kind]) for kind in ("model", "base", "difference"))
    for name, item in difference.datasets.items():
        cells = _cells(base.datasets[name], model.datasets[name], item)
        table.add_row(name, *cells, counted(item.num_units, item.unit.removesuffix("s")))
    if len(difference.datasets) > 1:
        table.add_section()
        table.add_row("mean", *_cells(base.mean, model.mean, difference.mean), difference.mean.unit)
    screen.answer(table)
    for note in result["notes"]:
        screen.note(note)


def _cells(base: Estimate, model: Estimate, difference: Estimate) -> list[Cell]:
    colour = "" if not difference.interval.excludes_zero else "green" if difference.value < 0 else "red"
    changed = tuple(Text(part, colour) for part in shown_estimate(difference, sign=True))
    return [shown_estimate(base), shown_estimate(model), changed]


def shown_estimate(item: Estimate, *, sign: bool = False) -> tuple[str, str]:
    """A mean and its interval, as the parts of a cell: "1.234" and "[1.100, 1.300]".

    Args:
        sign: whether to show a plus before positive numbers, as for a difference.
    """
    form = "{:+.3f}" if sign else "{:.3f}"
    ends = item.interval.as_json()
    return form.format(item.value), f"[{', '.join(form.format(end) for end in ends)}]" if ends else "[not known]"
