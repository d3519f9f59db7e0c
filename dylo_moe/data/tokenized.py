"""Tokenised datasets, with the columns that decide whether a row is trained, held out or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from dylo_moe.data.config import DataConfig
from dylo_moe.data.contamination import Benchmarks
from dylo_moe.data.encoding import TextFormat
from dylo_moe.data.sources.examples import Fate
from dylo_moe.data.sources.formats import NOT_UTF8, NOT_UTF8_BUT_UTF16
from dylo_moe.data.sources.read import SourceRows
from dylo_moe.data.splitting import find_duplicates
from dylo_moe.data.tokenizing import tokenise
from dylo_moe.utils.words import counted, listed

MAX_UNREAD = 100
"""The most columns that nothing reads that are kept, for every row may have others."""

MAX_NAMED = 6
"""The most columns that nothing reads that a sentence names together."""


class Reason(NamedTuple):
    """One reason why rows were left out or changed, and how many."""

    num_rows: int
    text: str
    first: str
    """Where the first such row is: FILE:LINE, or the row's number."""


class TokenizedDataset(NamedTuple):
    """One dataset's tokenised rows, and as arrays [N] the columns that decide how each row is used."""

    reading: SourceRows
    rows: Dataset
    lengths: NDArray[np.int32]
    whole_lengths: NDArray[np.int32]
    """The length of each row in tokens, before anything was cut or dropped."""
    trained: NDArray[np.int32]
    digests: NDArray[np.int64]
    documents: NDArray[np.int64]
    fates: NDArray[np.int8]
    cuts: NDArray[np.int8]
    given: NDArray[np.bool_]
    """Whether each row belongs to the published validation split."""
    duplicate_of: NDArray[np.int16]
    """The index of the dataset that has the same row earlier; -1 if none has."""

    @property
    def name(self) -> str:
        """The name of the dataset."""
        return self.reading.name

    @property
    def good(self) -> NDArray[np.bool_]:
        """Whether each row may be trained on or held out."""
        return (self.fates == Fate.KEPT) & (self.duplicate_of < 0)

    @property
    def is_one_document(self) -> bool:
        """Whether all good rows come from one file, or ask the same question."""
        return len(np.unique(self.documents[self.good])) == 1

    def num(self, fate: Fate) -> int:
        """The number of rows with that fate."""
        return int((self.fates == fate).sum())

    def reasons(self) -> list[Reason]:
        """Why rows were left out or changed, for any reason but their length; the most frequent reason first."""
        noted = pc.not_equal(self.rows.data.column("reason"), "").to_numpy(zero_copy_only=False)
        return self._reasons_of(noted & (self.fates != Fate.TOO_LONG))

    def why_lost(self) -> list[str]:
        """The reasons for which rows cannot be used, but for their length, each with the place of the first such row.

        A wrong encoding comes first, because it often causes the others.
        """
        lost = self._reasons_of(~np.isin(self.fates, (Fate.KEPT, Fate.TOO_LONG)))
        lost.sort(key=lambda reason: reason.text not in (NOT_UTF8, NOT_UTF8_BUT_UTF16))
        said = [f"{reason.text} ({counted(reason.num_rows, 'row')}, first {reason.first})" for reason in lost[:3]]
        if others := sum(reason.num_rows for reason in lost[3:]):
            said.append(f"{counted(others, 'more row')} with other reasons")
        return said

    def unread(self) -> dict[str, int]:
        """The columns that hold something and that nothing reads, and in how many of the rows that could be read; the
        most frequent one first, and MAX_UNREAD at most."""
        counts: Counter[str] = Counter()
        for found in pc.value_counts(self.rows.data.column("unread")).to_pylist():
            counts.update(dict.fromkeys(found["values"].splitlines(), found["counts"]))
        return dict(counts.most_common(MAX_UNREAD))

    def unread_in_words(self) -> str:
        """A sentence about the columns that nothing reads; an empty string if there are none."""
        groups: dict[int, list[str]] = {}
        for name, num_rows in self.unread().items():
            groups.setdefault(num_rows, []).append(name)
        said = [f"{listed(names, most=MAX_NAMED)} ({counted(num, 'row')})" for num, names in groups.items()]
        return f"{self.name} has columns that nothing reads: {listed(said, most=MAX_NAMED)}." if said else ""

    def _reasons_of(self, marked: NDArray[np.bool_]) -> list[Reason]:
        """The reasons of the marked rows; the most frequent one first."""
        places = np.flatnonzero(marked)
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}
        for row in self.rows.select(places).select_columns(["reason", "place"]):
            counts[row["reason"]] += 1
            first.setdefault(row["reason"], row["place"])
        return [Reason(count, text, first[text]) for text, count in counts.most_common()]


def tokenise_all(
    readings: Sequence[SourceRows], form: TextFormat, config: DataConfig, benchmarks: Benchmarks | None
) -> list[TokenizedDataset]:
    """Tokenise the rows of all datasets, and mark the duplicates among them.

    Raises:
        ValueError: for a dataset without a usable row.
    """
    tables = [_table(reading, form, config, benchmarks) for reading in readings]
    good = [np.flatnonzero(table.fates == Fate.KEPT) for table in tables]
    found = find_duplicates(
        [table.digests[rows] for table, rows in zip(tables, good, strict=True)],
        [table.given[rows] for table, rows in zip(tables, good, strict=True)],
    )
    for table, rows, marks in zip(tables, good, found, strict=True):
        table.duplicate_of[rows] = marks
    return tables


def _first_broken(splits: Sequence[Dataset]) -> int:
    """The index of the first row that holds a string which is not UTF-8, within its split."""
    for split in splits:
        for index in range(len(split)):
            try:
                split[index]
            except UnicodeDecodeError:
                return index
    return 0


def _table(
    reading: SourceRows, form: TextFormat, config: DataConfig, benchmarks: Benchmarks | None
) -> TokenizedDataset:
    splits = [reading.train] + ([reading.validation] if reading.validation is not None else [])
    try:
        parts = [
            tokenise(
                split,
                key=f"{reading.key}-{place}",
                columns=reading.columns,
                text_format=form,
                config=config,
                benchmarks=benchmarks,
                name=reading.name,
            )
            for place, split in enumerate(splits)
        ]
    except UnicodeDecodeError as error:  # a parquet file's strings are not checked by those who write or read it
        raise ValueError(
            f"the dataset {reading.name!r} ({reading.origin}) has strings that are not UTF-8, the first in row "
            f"{_first_broken(splits)} ({error}); decode them from their encoding, and write the file again"
        ) from error
    rows = concatenate_datasets(parts)

    def array(name: str) -> NDArray:
        return rows.data.column(name).to_numpy()

    table = TokenizedDataset(
        reading,
        rows,
        array("length"),
        array("whole_length"),
        array("trained"),
        array("digest"),
        array("document"),
        array("fate"),
        array("cut"),
        given=np.arange(len(rows)) >= len(parts[0]),
        duplicate_of=np.full(len(rows), -1, np.int16),
    )
    if not table.num(Fate.KEPT):
        found = table.why_lost()
        if table.num(Fate.TOO_LONG):
            found.append(f"over {config.max_seq_length} tokens ({counted(table.num(Fate.TOO_LONG), 'row')})")
        raise ValueError(f"the dataset {reading.name!r} ({reading.origin}) has no usable row: {'; '.join(found)}")
    return table
