"""Load datasets by their names: shuffled training rows, held-out rows of each dataset, and a count of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.config import DataConfig
from dylo_moe.data.contamination import Benchmarks, load_benchmarks
from dylo_moe.data.encoding import TextFormat, text_format
from dylo_moe.data.mixing import Share, epoch_rows, interleave, measure_shares, pass_over
from dylo_moe.data.sources.examples import Fate
from dylo_moe.data.sources.locate import locate_for_training
from dylo_moe.data.sources.read import SourceRows, read_dataset
from dylo_moe.data.splitting import hold_out, order_keys, subset
from dylo_moe.data.tokenized import Reason, TokenizedDataset, tokenise_all
from dylo_moe.data.tokenizing import CUT_PROMPT, CUT_RESPONSE
from dylo_moe.utils.words import counted

SAMPLE_TEXT_TOKENS = 24
"""The number of tokens at the start of a held-out plain text from which a sample is generated."""

SEARCH_SEED = -1
"""The seed that chooses the rows that are kept for a search; no run has it."""

MAX_PASSES = 1000
"""The most times that a row may be seen in one epoch."""

_COLUMNS = ["input_ids", "labels", "length"]


class DatasetCounts(NamedTuple):
    """How many rows of one dataset were read, and how each was used or why it was left out.

    read = train + evaluation + search + unused + too_long + empty + malformed + duplicates + duplicates_across +
    held_out + contaminated. `cut_prompt` and `cut_response` count rows that were kept. `left_out` is not part of
    `read`.
    """

    name: str
    documents: int
    """The number of files, or of different questions."""
    read: int
    train: int
    evaluation: int
    search: int
    """Rows that are kept for a search of settings: neither trained nor held out."""
    cut_prompt: int
    """Rows that lost the start of their prompt."""
    cut_response: int
    """Rows that lost the end of their response, and have no end token."""
    too_long: int
    empty: int
    malformed: int
    duplicates: int
    """Rows that repeat an earlier row of this dataset."""
    duplicates_across: int
    """Rows that repeat a row of another dataset."""
    held_out: int
    """Rows that are not trained because their question is held out, or kept for a search, in some dataset."""
    contaminated: int
    unused: int
    """Usable rows that training_subset and eval_subset leave out."""
    left_out: int
    """Rows of splits that are not for training, or beyond the bound on the machine's own text."""


class LoadedData(NamedTuple):
    """Everything that training needs of its datasets.

    Rows hold `input_ids`, `labels`, `length` and `domain`, the index of their dataset in `names`.
    """

    names: list[str]
    train: Dataset
    """The rows of one epoch, mixed and shuffled."""
    evaluation: dict[str, Dataset]
    search: dict[str, Dataset]
    """The rows of each dataset that are kept for a search of settings; empty without `search_subset`."""
    counts: list[DatasetCounts]
    shares: list[Share]
    reasons: dict[str, list[Reason]]
    readings: list[SourceRows]
    """The datasets as they were found."""
    notes: list[str]
    """What a reader should know before training, in sentences."""
    unread: dict[str, dict[str, int]]
    """For each dataset the columns that nothing reads, and how many rows hold something there."""
    fingerprint: dict[str, str]
    """What identifies the rows: for each dataset the number and a hash of its training and held-out rows, and a hash of
    the epoch's order. It depends on token ids and labels alone, not on where the texts are stored."""
    sample_prompts: dict[str, list[int]]
    """For each dataset the ids from which a sample is generated: a held-out prompt, or the start of a held-out text."""

    @property
    def origins(self) -> dict[str, str]:
        """The origin of each dataset in words, by the dataset's name."""
        return {reading.name: reading.origin for reading in self.readings}


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> LoadedData:
    """Read, tokenise, split and mix datasets.

    The validation split of a dataset, if it has one, is held out; otherwise about a tenth of its rows is, by document:
    all rows of a file, or with the same question, are on the same side of the split. A row that repeats an earlier one
    of any dataset is removed, and no question that is held out in one dataset is trained in another. With
    `search_subset` some rows are kept apart first, the same ones for every seed: no seed trains them or holds them out,
    nor a row with the same question in another dataset. All choices come
    from hashes of the seed and the texts, so one seed gives the same rows on every machine with the same texts and
    tokenizer, and a smaller subset is a part of a larger one.

    Args:
        config: what to read, and how.
        seed: decides the split, the subsets and the order.

    Raises:
        ValueError: for a dataset that cannot be read, is not for training, or has too few usable rows.
    """
    sources = locate_for_training(config)
    benchmarks = _benchmarks(config)
    form = text_format(tokenizer)
    readings = [read_dataset(source, config) for source in sources]
    tables = tokenise_all(readings, form, config, benchmarks)
    split = _split(tables, config, seed)
    epoch, shares = _draw_epoch(tables, split.kept, config, seed)
    parts = [table.rows.select_columns(_COLUMNS) for table in tables]
    parts = [part.add_column("domain", np.full(len(part), domain)) for domain, part in enumerate(parts)]
    names = [table.name for table in tables]
    return LoadedData(
        names=names,
        train=concatenate_datasets(parts).select(epoch),
        evaluation={name: part.select(rows) for name, part, rows in zip(names, parts, split.judged, strict=True)},
        search={
            name: part.select(np.flatnonzero(marks))
            for name, part, marks in zip(names, parts, split.search, strict=True)
        }
        if config.search_subset
        else {},
        counts=[_count(place, table, split) for place, table in enumerate(tables)],
        shares=shares,
        reasons={table.name: table.reasons() for table in tables},
        readings=readings,
        notes=[*_notes(tables), *([] if benchmarks is None else [_compared(tables, benchmarks)])],
        unread={table.name: table.unread() for table in tables},
        fingerprint=_fingerprint(tables, split, epoch),
        sample_prompts={
            table.name: _sample_prompt(table, rows[0], form) for table, rows in zip(tables, split.judged, strict=True)
        },
    )


def _benchmarks(config: DataConfig) -> Benchmarks | None:
    """Load the benchmarks that rows are compared with; None without `decontaminate`. Raises ValueError if one is
    missing."""
    if not config.decontaminate:
        return None
    benchmarks, missing = load_benchmarks(config)
    if missing:
        raise ValueError(f"decontaminate cannot compare with {' and '.join(missing)}: {'; '.join(missing.values())}")
    return benchmarks


# What is held out, and what is trained


class _Split(NamedTuple):
    """How the rows of each dataset are used, in the order of the datasets."""

    search: list[NDArray[np.bool_]]
    """Whether each row is kept for a search of settings."""
    held_out: list[NDArray[np.bool_]]
    """Whether each row is held out."""
    judged: list[NDArray[np.int64]]
    """Indices of the held-out rows that are used: eval_subset percent of them."""
    usable: list[NDArray[np.bool_]]
    """Whether each row may be trained."""
    kept: list[NDArray[np.int64]]
    """Indices of the rows that are trained: training_subset percent of the usable ones."""


def _split(tables: Sequence[TokenizedDataset], config: DataConfig, seed: int) -> _Split:
    search = _keep_for_search(tables, config.search_subset)
    barred = [own | other for own, other in zip(search, _with_documents_of(tables, search), strict=True)]
    held_out = _hold_out(tables, barred, seed)
    usable = _not_held_out_elsewhere(tables, held_out, barred)
    judged = [_subset_of(table, held, config.eval_subset, seed) for table, held in zip(tables, held_out, strict=True)]
    kept = [_subset_of(table, use, config.training_subset, seed) for table, use in zip(tables, usable, strict=True)]
    return _Split(search, held_out, judged, usable, kept)


def _keep_for_search(tables: Sequence[TokenizedDataset], percent: float) -> list[NDArray[np.bool_]]:
    """Mark that percentage of the rows of each dataset, in whole documents, of which none is in a validation split."""
    marks = [np.zeros(len(table.rows), bool) for table in tables]
    if not percent:
        return marks
    given = _with_documents_of(tables, [table.good & table.given for table in tables])
    for table, mark, is_judged in zip(tables, marks, given, strict=True):
        places = np.flatnonzero(table.good & ~table.given & ~is_judged)
        documents = (table.digests if table.is_one_document else table.documents)[places]
        if len(np.unique(documents)) < 3:
            raise ValueError(
                f"{_rows_in_words(table)}: too few to keep search_subset ({percent:g} %) of them apart from those that "
                "are trained and held out. Give more documents, or leave that dataset out"
            )
        mark[places] = hold_out(documents, SEARCH_SEED, percent / 100)
    return marks


def _with_documents_of(
    tables: Sequence[TokenizedDataset], marks: Sequence[NDArray[np.bool_]]
) -> list[NDArray[np.bool_]]:
    """Mark the rows of each dataset whose document has a marked row in some dataset.

    A dataset of one document is split by rows, so its own marks concern no other row of it.
    """
    marked = [np.unique(table.documents[mark]) for table, mark in zip(tables, marks, strict=True)]
    found = []
    for place, table in enumerate(tables):
        others = [part for index, part in enumerate(marked) if index != place or not table.is_one_document]
        found.append(np.isin(table.documents, np.concatenate(others)) if others else np.zeros(len(table.rows), bool))
    return found


def _hold_out(
    tables: Sequence[TokenizedDataset], barred: Sequence[NDArray[np.bool_]], seed: int
) -> list[NDArray[np.bool_]]:
    """Mark the rows of each dataset that are held out, of those that are not barred by a search."""
    held_out = []
    for table, is_barred in zip(tables, barred, strict=True):
        places = np.flatnonzero(table.good & ~is_barred)
        if table.reading.validation is not None:
            held_out.append(table.good & table.given)
            continue
        if len(places) < 2:
            raise ValueError(
                f"{_rows_in_words(table)}, and needs at least two: one to train on, and one that is held out to "
                f"measure the loss. {_OWN_VALIDATION}"
            )
        documents = table.digests if table.is_one_document else table.documents
        held = np.zeros(len(table.rows), bool)
        held[places] = hold_out(documents[places], seed)
        held_out.append(held)
    return held_out


def _not_held_out_elsewhere(
    tables: Sequence[TokenizedDataset], held_out: Sequence[NDArray[np.bool_]], barred: Sequence[NDArray[np.bool_]]
) -> list[NDArray[np.bool_]]:
    """Mark the rows of each dataset that may be trained: those that are not barred by a search, and whose document is
    not held out in any dataset."""
    elsewhere = _with_documents_of(tables, held_out)
    usable = [
        table.good & ~table.given & ~held & ~is_held & ~is_barred
        for table, held, is_held, is_barred in zip(tables, held_out, elsewhere, barred, strict=True)
    ]
    for table, use, held in zip(tables, usable, held_out, strict=True):
        if not use.any() or not held.any():
            raise ValueError(
                f"{_rows_in_words(table)}: {held.sum():,} would be held out, {use.sum():,} trained, and the others "
                "repeat a row, or ask a question, that is held out here or in another dataset. Give more rows, or "
                "leave that dataset out"
            )
    return usable


_OWN_VALIDATION = (
    "About a tenth of the rows is held out, at least one; to choose them yourself, give --datasets a folder with the "
    "files train.jsonl and validation.jsonl"
)


def _rows_in_words(table: TokenizedDataset) -> str:
    """How many rows a dataset has and can use, and why not more."""
    why = table.why_lost()
    if too_long := table.num(Fate.TOO_LONG):
        why.append(f"{too_long:,} too long")
    if repeated := int((table.duplicate_of >= 0).sum()):
        why.append(f"{repeated:,} that repeat another row")
    usable = int(table.good.sum())
    return f"the dataset {table.name!r} ({table.reading.origin}) has {counted(len(table.rows), 'row')}" + (
        f", of which {usable:,} {'is' if usable == 1 else 'are'} usable ({'; '.join(why)})" if why else ""
    )


def _subset_of(table: TokenizedDataset, which: NDArray[np.bool_], percent: float, seed: int) -> NDArray[np.int64]:
    """Indices of that percentage of the rows of a dataset that `which` marks."""
    places = np.flatnonzero(which)
    return places[subset(table.digests[places], percent, seed)]


def _draw_epoch(
    tables: Sequence[TokenizedDataset], kept: Sequence[NDArray[np.int64]], config: DataConfig, seed: int
) -> tuple[NDArray[np.int64], list[Share]]:
    """Indices of an epoch's rows in the concatenation of all datasets, and each dataset's share of the epoch."""
    names, sizes = [table.name for table in tables], [len(rows) for rows in kept]
    wanted = [config.shares.get(name, 1 / len(tables)) for name in names]
    is_mixed = bool(config.mix or config.interleaved_sampling)
    counts = epoch_rows(sizes, wanted) if is_mixed else sizes
    for name, size, count in zip(names, sizes, counts, strict=True):
        if count > MAX_PASSES * size:
            raise ValueError(
                f"with these shares an epoch would show each of the {size:,} rows of {name!r} {count / size:,.0f} "
                f"times; at most {MAX_PASSES:,} are allowed. Give the smaller datasets smaller shares"
            )
    starts = np.cumsum([0, *(len(table.rows) for table in tables[:-1])])
    drawn = [
        pass_over(rows, table.digests[rows], count, seed)
        for table, rows, count in zip(tables, kept, counts, strict=True)
    ]
    tokens = [int(table.trained[rows].sum(dtype=np.int64)) for table, rows in zip(tables, drawn, strict=True)]
    shares = measure_shares(names, sizes, counts, tokens)
    parts = [rows + start for rows, start in zip(drawn, starts, strict=True)]
    if is_mixed:
        return interleave(parts), shares
    everything = np.concatenate(parts)
    digests = np.concatenate([table.digests[rows] for table, rows in zip(tables, drawn, strict=True)])
    return everything[np.argsort(order_keys(digests, seed), kind="stable")], shares


def _fingerprint(tables: Sequence[TokenizedDataset], split: _Split, epoch: NDArray[np.int64]) -> dict[str, str]:
    def of(digests: NDArray[np.int64], trained: NDArray[np.int32]) -> str:
        return xxhash.xxh3_64_hexdigest(np.stack([digests, trained.astype(np.int64)]).tobytes())

    parts = {
        f"{place}: {what} rows": f"{len(rows)} rows, {of(table.digests[rows], table.trained[rows])}"
        for place, table in enumerate(tables)
        for what, rows in _parts_of(split, place)
    }
    everything = [np.concatenate([getattr(table, name) for table in tables]) for name in ("digests", "trained")]
    return {**parts, "the epoch's order": f"{len(epoch)} rows, {of(everything[0][epoch], everything[1][epoch])}"}


def _parts_of(split: _Split, place: int) -> list[tuple[str, NDArray[np.int64]]]:
    """The indices of the rows of one dataset that are used, by what they are used for."""
    search = np.flatnonzero(split.search[place])
    parts = [("training", split.kept[place]), ("held-out", split.judged[place])]
    return [*parts, ("search", search)] if len(search) else parts


# What is reported about the data


def _count(place: int, table: TokenizedDataset, split: _Split) -> DatasetCounts:
    search, held_out, judged, usable, kept = (part[place] for part in split)
    used = np.concatenate([kept, judged, np.flatnonzero(search)])
    return DatasetCounts(
        name=table.name,
        documents=len(np.unique(table.documents[table.good])),
        read=len(table.rows),
        train=len(kept),
        evaluation=len(judged),
        search=int(search.sum()),
        cut_prompt=int((table.cuts[used] & CUT_PROMPT > 0).sum()),
        cut_response=int((table.cuts[used] & CUT_RESPONSE > 0).sum()),
        too_long=table.num(Fate.TOO_LONG),
        empty=table.num(Fate.EMPTY),
        malformed=table.num(Fate.MALFORMED),
        duplicates=int((table.duplicate_of == place).sum()),
        duplicates_across=int(((table.duplicate_of >= 0) & (table.duplicate_of != place)).sum()),
        held_out=int((table.good & ~table.given & ~usable & ~held_out & ~search).sum()),
        contaminated=table.num(Fate.CONTAMINATED),
        unused=int(usable.sum() + held_out.sum()) - len(kept) - len(judged),
        left_out=table.reading.left_out,
    )


def _notes(tables: Sequence[TokenizedDataset]) -> list[str]:
    sources = [table.reading.source for table in tables]
    licences = [
        f"{source.name} is licensed {source.licence}: not for commercial use; that may bind a model trained on it."
        for source in sources
        if source is not None and source.non_commercial
    ]
    return (
        licences
        + [said for table in tables if (said := table.unread_in_words())]
        + [
            f"{table.name} is one document, or asks one question, so it is split by rows."
            for table in tables
            if table.is_one_document and table.reading.validation is None
        ]
    )


def _compared(tables: Sequence[TokenizedDataset], benchmarks: Benchmarks) -> str:
    removed = sum(table.num(Fate.CONTAMINATED) for table in tables)
    problems = f"the {len(benchmarks.problems):,} problems of HumanEval and MBPP's test split"
    if not removed:
        return f"No row overlaps with {problems}."
    verbs = ("overlaps", "is") if removed == 1 else ("overlap", "are")
    return f"{counted(removed, 'row')} {verbs[0]} with {problems}, and {verbs[1]} removed."


def _sample_prompt(table: TokenizedDataset, place: np.int64, form: TextFormat) -> list[int]:
    row = table.rows[int(place)]
    ids = row["input_ids"]
    if row["prompt_length"]:
        return ids[: row["prompt_length"]]
    return ids[: min(SAMPLE_TEXT_TOKENS, len(ids) - (ids[-1] == form.text_end_id))]
