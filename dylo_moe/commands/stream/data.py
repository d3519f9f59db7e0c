"""The data of a stream: what each dataset is read for, and which rows each stage learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dylo_moe.commands.stream.request import StreamRequest
from dylo_moe.data.collator import Collator
from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import LoadedData, load_data
from dylo_moe.data.turn_rows import only_answers
from dylo_moe.data.turn_tokens import find_turn_tokens
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import RouterConfig
from dylo_moe.routing.turn_tokens import TurnTokens

SKILL_BATCH = 16
"""Rows in a batch for the novelty detector and the skill library."""


class Roles(NamedTuple):
    """The names of the datasets, grouped by their purpose."""

    learned: list[str]
    measured: list[str]
    known: list[str]
    base: list[str]


class StageData(NamedTuple):
    """The data of one stage."""

    name: str
    """The name of the dataset or of the chunk."""
    rows: Dataset
    rank: int | None
    """The rank of an expert that grows from it; None: the default."""


def read_data(request: StreamRequest, tokenizer: PreTrainedTokenizerBase) -> LoadedData:
    """Read all datasets together, in the order of `Roles`, so that rows which several of them share are found."""
    with request.train.main_process_first(desc="tokenising"):  # the others take it from the cache
        data = load_data(all_data(request), tokenizer, seed=request.train.seed)
    turns = turns_of(request, tokenizer)
    return data if turns is None else only_answers(data, turns, plain=roles_of(request, data).base)


def turns_of(request: StreamRequest, tokenizer: PreTrainedTokenizerBase) -> TurnTokens | None:
    """What opens and closes an answer, where answers are routed as wholes; of --checkpoint's pool, as it says."""
    if request.stream.checkpoint is not None:
        return RouterConfig(**read_manifest(request.stream.checkpoint)["router"]).turns
    return find_turn_tokens(tokenizer) if request.router.per_response else None


def all_data(request: StreamRequest) -> DataConfig:
    """The options of the data, with the datasets of every role."""
    stream = request.stream
    names = [*request.data.datasets, *stream.eval_datasets, *stream.known_datasets, *stream.base_datasets]
    return replace(request.data, datasets=names)


def roles_of(request: StreamRequest, data: LoadedData) -> Roles:
    """Group the names that the loaded data gave to its datasets by role; they are in the order of reading."""
    stream, names = request.stream, iter(data.names)
    groups = (request.data.datasets, stream.eval_datasets, stream.known_datasets, stream.base_datasets)
    return Roles(*([next(names) for _ in group] for group in groups))


def rows_of(data: LoadedData, name: str) -> Dataset:
    """Select the training rows of one dataset, in the order of the epoch."""
    return data.train.select(np.flatnonzero(np.asarray(data.train["domain"]) == data.names.index(name)))


def sample_of(rows: Dataset, collator: Collator, num_rows: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of the first rows, at most `num_rows`, for the novelty detector and the skill library."""
    count = min(num_rows, len(rows))
    for start in range(0, count, SKILL_BATCH):
        yield collator([rows[row] for row in range(start, min(start + SKILL_BATCH, count))])


def text_means(model: DyLoRAMoE, rows: Dataset, collator: Collator) -> Tensor:
    """The mean of the router features of each row: fp32 [rows, hidden], on the CPU."""
    if model.router_config.per_response:  # where each answer has a feature of its own, and a row may have several
        alone = (model.text_features([collator([row])]) for row in rows)
        return torch.stack([torch.cat(features).mean(0).cpu() for features in alone])
    batches = sample_of(rows, collator, len(rows))
    return torch.stack([text.mean(0).cpu() for batch in batches for text in model.text_features([batch])])


def stream_rows(request: StreamRequest, data: LoadedData) -> Dataset:
    """The training rows of all datasets that are learned, joined in order."""
    return concatenate_datasets([rows_of(data, name) for name in roles_of(request, data).learned])


def stages_of(request: StreamRequest, data: LoadedData, changes: Sequence[int] = ()) -> Sequence[StageData]:
    """Divide the data into stages: one dataset each, or one chunk each of all datasets joined in order.

    Args:
        changes: rows at which another kind of text begins, of a stream in chunks: a chunk ends before each of them.
    """
    names = roles_of(request, data).learned
    size = request.stream.chunk_examples
    if size is None:
        ranks: Sequence[int | None] = request.stream.ranks or [None] * len(names)
        return [StageData(name, rows_of(data, name), rank) for name, rank in zip(names, ranks, strict=True)]
    rows = stream_rows(request, data)
    return [
        StageData(f"chunk_{number}", rows.select(range(start, end)), None)
        for number, (start, end) in enumerate(chunks(len(rows), changes, size), 1)
    ]


def chunks(num_rows: int, changes: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Where the chunks of a stream begin and end. One ends before each change; the last one before it also takes the
    remaining rows, which are too few for a chunk."""
    found: list[tuple[int, int]] = []
    for start, end in pairwise([0, *changes, num_rows]):
        starts = [start + size * number for number in range(max((end - start) // size, 1))]
        found += pairwise([*starts, end])
    return found


def rows_by_dataset(data: LoadedData, stage: StageData) -> dict[str, int]:
    """Count the rows of a stage that come from each dataset."""
    domains, counts = np.unique(np.asarray(stage.rows["domain"]), return_counts=True)
    return {data.names[domain]: int(count) for domain, count in zip(domains, counts, strict=True)}
