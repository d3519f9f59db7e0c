"""From names to shuffled training rows, held-out rows per dataset, and counts of every example's fate."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.formats import IGNORED, Encoded, TextFormat, encode, text_format
from dylo_moe.data.sources import read_source, source_name

HELD_OUT_SHARE = 0.1
"""Share of a dataset's examples that is held out, in whole documents."""

SAMPLE_TEXT_TOKENS = 24
"""Tokens of a held-out plain text that a sample is generated from."""

MIN_SEQ_LENGTH = 16

logger = logging.getLogger(__name__)


class DatasetCounts(NamedTuple):
    """What happened to one dataset. `examples` were read; each is then dropped, a duplicate, or a row.

    With `training_subset` and `eval_subset` at 100, examples = train + evaluation + dropped + duplicates.
    `cut` counts rows shortened to fit, before subsets are taken. `malformed` (lines of a local file) and
    `left_out` (by the bound on built-in sources) come on top of `examples`.
    """

    name: str
    documents: int
    examples: int
    train: int
    evaluation: int
    cut: int
    dropped: int
    duplicates: int
    malformed: int
    left_out: int


class LoadedData(NamedTuple):
    """Rows hold `input_ids`, `labels` and `domain`, the index of their dataset in `names`."""

    names: list[str]
    train: Dataset
    """All datasets concatenated and shuffled: each weighs as many rows as it has."""
    evaluation: dict[str, Dataset]
    counts: list[DatasetCounts]
    sample_prompts: dict[str, list[int]]
    """Per dataset the ids of one held-out prompt, or the start of a held-out plain text, to generate from."""


class _Row(NamedTuple):
    encoded: Encoded
    document: str
    key: bytes  # its place in every shuffle and subset


def load_data(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    training_subset: float = 100.0,
    eval_subset: float = 100.0,
    seed: int = 0,
) -> LoadedData:
    """Read, tokenise, split and mix datasets.

    About a tenth of every dataset is held out, by document, so no document gives rows to both sides. A row
    that repeats an earlier one, of whichever dataset, is removed before the split. All choices come from
    SHA-256 of the seed and of names, so one seed gives the same rows on every machine with the same texts,
    and a smaller subset lies inside a larger one.

    Args:
        names: names from SOURCES, or paths of local `.jsonl` files; the stem is then the dataset's name.
        max_seq_length: most tokens of one row, at least 16.
        training_subset: percent of each dataset's training rows to use, above 0 and at most 100.
        eval_subset: percent of each dataset's held-out rows to use, likewise.
        seed: decides the split, the subsets and the order.

    Raises:
        ValueError: arguments that break a rule (all of them in one message), a file that cannot be read, or a
            dataset with fewer than two documents left, which cannot be split.
    """
    dataset_names = _checked_names(names, max_seq_length, training_subset, eval_subset)
    form = text_format(tokenizer)
    seen: set[tuple[int, ...]] = set()
    train: list[tuple[int, _Row]] = []
    evaluation: dict[str, Dataset] = {}
    counts: list[DatasetCounts] = []
    sample_prompts: dict[str, list[int]] = {}
    for domain, (argument, name) in enumerate(zip(names, dataset_names, strict=True)):
        rows, count = _read_rows(argument, name, form, max_seq_length, seed, seen)
        held_out = _held_out_documents(name, rows, seed)
        kept = _subset([row for row in rows if row.document not in held_out], training_subset)
        judged = _subset([row for row in rows if row.document in held_out], eval_subset)
        train += [(domain, row) for row in kept]
        evaluation[name] = _dataset([(domain, row) for row in judged])
        sample_prompts[name] = _sample_prompt(judged[0], form, max_seq_length)
        counts.append(count._replace(train=len(kept), evaluation=len(judged)))
    train.sort(key=lambda item: item[1].key)
    return LoadedData(dataset_names, _dataset(train), evaluation, counts, sample_prompts)


def _checked_names(names: Sequence[str], max_seq_length: int, training: float, evaluation: float) -> list[str]:
    """The datasets' names; ValueError holds every broken rule at once."""
    problems = []
    dataset_names = []
    if isinstance(names, str):
        raise ValueError(f"names is the string {names!r}; give a list of names")
    for argument in names:
        try:
            dataset_names.append(source_name(argument))
        except ValueError as error:
            problems.append(str(error))
    if not names:
        problems.append("names is empty; give at least one dataset")
    for name, times in Counter(dataset_names).items():
        if times > 1:
            problems.append(f"names holds {name!r} {times} times; each dataset needs a name of its own")
    if max_seq_length < MIN_SEQ_LENGTH:
        problems.append(f"max_seq_length is {max_seq_length}; it must be at least {MIN_SEQ_LENGTH} tokens")
    for label, percent in (("training_subset", training), ("eval_subset", evaluation)):
        if not 0 < percent <= 100:
            problems.append(f"{label} is {percent}; it must be a percentage above 0 and at most 100")
    if problems:
        raise ValueError("; ".join(problems))
    return dataset_names


def _key(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def _read_rows(
    argument: str, name: str, form: TextFormat, max_seq_length: int, seed: int, seen: set[tuple[int, ...]]
) -> tuple[list[_Row], DatasetCounts]:
    """Rows of one dataset in reading order, none of them in `seen`, which grows by them."""
    reading = read_source(argument)
    if reading.malformed:
        logger.warning("%s: %d malformed lines, first %s", name, reading.malformed, reading.first_malformed)
    rows: list[_Row] = []
    dropped = duplicates = 0
    for index, example in enumerate(reading.examples):
        encoded = encode(form, example, max_seq_length)
        if encoded is None:
            dropped += 1
        elif (ids := tuple(encoded.input_ids)) in seen:
            # equal texts give equal ids; so do texts that differ only in what was cut off, which nobody sees
            duplicates += 1
        else:
            seen.add(ids)
            rows.append(_Row(encoded, example.document, _key(seed, name, example.document, index)))
    documents = len({example.document for example in reading.examples})
    cut = sum(row.encoded.cut for row in rows)
    return rows, DatasetCounts(
        name,
        documents,
        len(reading.examples),
        0,
        0,
        cut,
        dropped,
        duplicates,
        reading.malformed,
        reading.left_out,
    )


def _held_out_documents(name: str, rows: list[_Row], seed: int) -> set[str]:
    """Documents in the order of their hash, as long as they fit into the held-out share; one at least."""
    sizes = Counter(row.document for row in rows)
    if len(sizes) < 2:
        raise ValueError(
            f"the dataset {name!r} has usable rows from {len(sizes)} document(s); "
            "it needs two at least, one to train on and one to hold out"
        )
    room = max(1, round(HELD_OUT_SHARE * len(rows)))
    held_out: set[str] = set()
    order = sorted(sizes, key=lambda document: _key(seed, document))
    for document in order:
        if sizes[document] <= room:
            held_out.add(document)
            room -= sizes[document]
    return held_out or {min(order, key=lambda document: sizes[document])}


def _subset(rows: list[_Row], percent: float) -> list[_Row]:
    """That share of the rows, one at least, in the order they had."""
    count = max(1, round(len(rows) * percent / 100))
    chosen = {row.key for row in sorted(rows, key=lambda row: row.key)[:count]}
    return [row for row in rows if row.key in chosen]


def _sample_prompt(row: _Row, form: TextFormat, max_seq_length: int) -> list[int]:
    if row.encoded.prompt_ids:
        return row.encoded.prompt_ids[-max_seq_length:]
    ids = row.encoded.input_ids
    return ids[: min(SAMPLE_TEXT_TOKENS, len(ids) - (ids[-1] == form.text_end_id))]


def _dataset(rows: list[tuple[int, _Row]]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [row.encoded.input_ids for _, row in rows],
            "labels": [row.encoded.labels for _, row in rows],
            "domain": [domain for domain, _ in rows],
        }
    )


class Collator:
    """Make a batch of rows, padded on the right; padding is told by its place, so pad may equal eos.

    Returns `input_ids`, `attention_mask` and `labels`, each [batch, longest row], and `domain` [batch]: int64.
    Raises ValueError where the tokenizer has neither a pad nor an eos token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad_id is None:
            raise ValueError("the tokenizer has neither a pad nor an eos token; set tokenizer.pad_token")
        self.pad_id: int = pad_id

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            length = len(row["input_ids"])
            padding = longest - length
            batch["input_ids"].append([*row["input_ids"], *[self.pad_id] * padding])
            batch["attention_mask"].append([1] * length + [0] * padding)
            batch["labels"].append([*row["labels"], *[IGNORED] * padding])
        tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in batch.items()}
        return {**tensors, "domain": torch.tensor([row["domain"] for row in rows], dtype=torch.int64)}
