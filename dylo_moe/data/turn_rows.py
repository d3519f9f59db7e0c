"""Check rows against routing by answers: every trained token must be one that an answer's expert predicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from dylo_moe.data.encoding import IGNORED
from dylo_moe.data.loading import LoadedData
from dylo_moe.routing.turn_tokens import TurnTokens
from dylo_moe.routing.turns import find_answers
from dylo_moe.utils.words import counted

ROWS_AT_ONCE = 256


def only_answers(data: LoadedData, turns: TurnTokens, *, plain: Collection[str] = ()) -> LoadedData:
    """The same rows, of which only those tokens are trained that are predicted within an answer.

    Others are those of an answer whose opening was cut off, for example: the base would predict them. How many rows
    lose labels stands in the notes.

    Args:
        turns: what opens and closes an answer.
        plain: datasets that may hold plain texts, because no expert learns them.

    Raises:
        ValueError: for datasets in which nothing is left to train.
    """
    checked = {place for place, name in enumerate(data.names) if name not in plain}
    sizes = Counter(data.train["domain"])
    train, lost, empty = _kept(data.train, turns, checked)
    evaluation, notes, without = {}, [], []
    for place, (name, rows) in enumerate(data.evaluation.items()):
        evaluation[name], lost_here, empty_here = _kept(rows, turns, checked & {place})
        size, num_lost = len(rows) + sizes[place], (lost + lost_here)[place]
        num_empty = (empty + empty_here)[place]
        if num_lost and num_empty == size:
            without.append(name)
        elif num_lost:
            notes.append(
                f"{name}: {counted(num_lost, 'row')} of {size:,} had trained tokens outside the answers that the chat "
                "template opens, as where the opening was cut off; these tokens are not trained, which leaves "
                f"{counted(num_empty, 'row')} with nothing to train"
            )
    if without:
        raise ValueError(
            f"granularity is 'response', and no row of {', '.join(without)} has an answer that the chat template "
            "opens, as where rows are plain texts: use granularity 'token'"
        )
    return data._replace(train=train, evaluation=evaluation, notes=[*data.notes, *notes])


def _kept(rows: Dataset, turns: TurnTokens, checked: set[int]) -> tuple[Dataset, Counter[int], Counter[int]]:
    """The rows without the labels that no answer's expert predicts, and of each domain the number of rows that lose
    some, and that have none left."""
    lost: Counter[int] = Counter()
    empty: Counter[int] = Counter()
    labels = []
    for batch in _batches(rows):
        kept = _within_answers(batch, turns)
        for row, domain in enumerate(batch["domain"]):
            before = after = batch["labels"][row]
            if domain in checked:
                after = kept[row, : len(before)].tolist()
            lost[domain] += before != after
            empty[domain] += before != after and all(label == IGNORED for label in after)
            labels.append(after)
    if lost.total():
        rows = rows.remove_columns("labels").add_column("labels", labels, feature=rows.features["labels"])
    return rows, lost, empty


def _batches(rows: Dataset) -> Iterator[dict[str, list[Any]]]:
    columns = rows.select_columns(["input_ids", "labels", "domain"])
    return (columns[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE))


def _within_answers(batch: dict[str, list[Any]], turns: TurnTokens) -> Tensor:
    """int64 [rows, longest]: the labels that are predicted by a token of an answer, and -100 elsewhere."""
    longest = max(map(len, batch["input_ids"]))

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([[*ids, *[value] * (longest - len(ids))] for ids in batch[name]])

    ids, labels = padded("input_ids", -1), padded("labels", IGNORED)
    by_answer = F.pad(find_answers(ids, mask=ids >= 0, turns=turns).tokens[:, :-1], (1, 0))
    return labels.masked_fill(~by_answer, IGNORED)
