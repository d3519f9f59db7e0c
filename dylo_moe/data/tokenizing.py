"""Turn raw rows into training rows: they are read, cut, tokenised on all cores, and cached by content and settings.

Every raw row gives at least one row here. A row that cannot be trained on carries its fate and the reason,
so that everything that is left out is counted and can be shown.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import xxhash
from datasets import Dataset, Features, List, Value

from dylo_moe.data import contamination, control_tokens, encoding, template_probes, templates, token_rows
from dylo_moe.data.config import DataConfig
from dylo_moe.data.contamination import Benchmarks
from dylo_moe.data.encoding import Encoded, TextFormat, encode_batch
from dylo_moe.data.sources import conversations, examples, formats, pieces, roles
from dylo_moe.data.sources.examples import Example, Fate, RowError, clean_text, printable
from dylo_moe.data.sources.files import RAW
from dylo_moe.data.sources.formats import parse_json, read_row
from dylo_moe.data.sources.pieces import cut_pieces
from dylo_moe.data.sources.roles import Columns, recognise, unread_columns

CHARACTERS_PER_TOKEN = 3
"""The estimate by which long texts are first cut; pieces that turn out too long are cut again."""

MIN_BYTES_PER_PROCESS = 4 * 2**20
"""The least raw text for a process; with less, starting another process takes longer than it saves."""

MAP_BATCH = 250
"""The number of raw rows tokenised at a time; it bounds memory where rows are large."""

ROW_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "prompt_length": Value("int32"),
        "length": Value("int32"),
        "whole_length": Value("int32"),
        "trained": Value("int32"),
        "digest": Value("int64"),
        "document": Value("int64"),
        "fate": Value("int8"),
        "cut": Value("int8"),
        "reason": Value("string"),
        "place": Value("string"),
        "unread": Value("string"),
    }
)
"""The columns of a tokenised row. `length` and `trained` count tokens, `whole_length` those before a cut. `digest` is a
hash of the ids, `document` of the file or question whose rows stay on one side of a split. `unread` names the columns
of the raw row that hold something and that nothing reads, a line for each."""

CUT_PROMPT, CUT_RESPONSE = 1, 2
"""The bits of the column `cut`."""

_NAME_LENGTH = 60
"""The most characters of a column's name that are kept, for a row of another kind may have whole texts as names."""

_NO_TOKENS = np.empty(0, np.int32)


class _Text(NamedTuple):
    """A text that becomes one row: an example, or the reason why there is none."""

    example: Example | RowError
    document: str
    place: str
    is_piece: bool = False
    """Whether it is a part of a file; if too long, it is cut in two, so that nothing of the file is lost."""
    unread: str = ""


class Tokenise:
    """The function that `Dataset.map` calls to turn batches of raw rows into tokenised rows.

    Args:
        text_format: how the tokenizer writes an exchange.
        config: the lengths, and what is trained.
        columns: which columns play which role; None: each row is recognised by its own columns.
        benchmarks: rows that overlap with one of these are contaminated; None: no row is compared.
        name: the dataset's name, which tells its files from those of the same name in other datasets.
        is_raw: whether the rows have the columns of RAW, rather than columns of their own.
    """

    def __init__(
        self,
        text_format: TextFormat,
        config: DataConfig,
        columns: Columns | None,
        benchmarks: Benchmarks | None,
        *,
        name: str,
        is_raw: bool,
    ) -> None:
        self.form = text_format
        self.config = config
        self.columns = columns
        self.benchmarks = benchmarks
        self.name = name
        self.is_raw = is_raw

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Tokenise a batch: the columns of ROW_FEATURES, in the order of the raw rows."""
        texts: list[_Text] = []
        for row, index in zip(_as_rows(batch), indices, strict=True):
            texts += self._raw_texts(row) if self.is_raw else [self._read(_without_nulls(row), place=f"row {index}")]
        texts = [self._decontaminated(text) for text in texts]
        found = self._encode([text.example for text in texts])
        rows: list[dict[str, Any]] = []
        for text, encoded in zip(texts, found, strict=True):
            rows += self._within_bound(text, encoded)
        return {name: [row[name] for row in rows] for name in ROW_FEATURES}

    def _raw_texts(self, row: dict[str, Any]) -> list[_Text]:
        """The texts of one row of RAW: one, or the pieces of a whole file."""
        place = row["place"]
        document = f"{self.name}\0{row['document']}" if row["document"] else ""
        if row["problem"]:
            return [_Text(RowError(Fate.MALFORMED, row["problem"]), document, place)]
        if not row["pieces"]:
            try:
                content = parse_json(row["raw"])
            except RowError as error:
                return [_Text(error, document, place)]
            return [self._read(content, place=place, document=document)]
        try:
            whole = clean_text(row["raw"].decode("utf-8"), "the file")
        except RowError as error:
            return [_Text(error, document, place)]
        size = CHARACTERS_PER_TOKEN * self.config.max_seq_length
        return [_Text(Example((), piece), document, place, True) for piece in cut_pieces(whole, size)]

    def _read(self, row: dict[str, Any], *, place: str, document: str = "") -> _Text:
        columns = self.columns or recognise(row)
        try:
            example = read_row(row, columns)
        except RowError as error:
            return _Text(error, document, place)
        unread = "" if columns is None else "\n".join(_shown(name) for name in unread_columns(row, columns))
        return _Text(example, document or example.question or example.response, place, unread=unread)

    def _decontaminated(self, text: _Text) -> _Text:
        if self.benchmarks is None or isinstance(text.example, RowError):
            return text
        found = self.benchmarks.overlap(text.example.text)
        if found is None:
            return text
        return text._replace(example=RowError(Fate.CONTAMINATED, f"it overlaps with {found.task}"))

    def _encode(self, examples: Sequence[Example | RowError]) -> list[Encoded | RowError]:
        good = [example for example in examples if isinstance(example, Example)]
        encoded = iter(
            encode_batch(
                self.form,
                good,
                max_seq_length=self.config.max_seq_length,
                overlong=self.config.overlong,
                loss_on=self.config.loss_on,
            )
        )
        return [next(encoded) if isinstance(example, Example) else example for example in examples]

    def _within_bound(self, text: _Text, encoded: Encoded | RowError) -> list[dict[str, Any]]:
        """The row of a text; for a piece that is too long, the rows of its parts."""
        too_long = encoded.fate is Fate.TOO_LONG if isinstance(encoded, RowError) else encoded.cut_response
        if not text.is_piece or not too_long:
            return [_row(text, encoded)]
        assert isinstance(text.example, Example)
        whole = text.example.response
        parts = [text._replace(example=Example((), part)) for part in cut_pieces(whole, len(whole) // 2 + 1)]
        if len(parts) < 2:
            return [_row(text, encoded)]
        rows = []
        for part, again in zip(parts, self._encode([part.example for part in parts]), strict=True):
            rows += self._within_bound(part, again)
        return rows


def tokenise(
    raw: Dataset,
    *,
    key: str,
    columns: Columns | None,
    text_format: TextFormat,
    config: DataConfig,
    benchmarks: Benchmarks | None,
    name: str,
) -> Dataset:
    """Tokenise the rows of a dataset into a memory-mapped file of the cache, or take it from there if nothing changed.

    Args:
        raw: rows with the columns of RAW, or with columns of their own.
        key: a hash of the rows' content.
        columns: which columns play which role; None: each row is recognised by its own columns.
        name: the dataset's name.

    Returns:
        Rows with the columns of ROW_FEATURES; at least one for each raw row.
    """
    settings = _settings_key(text_format, config, columns, benchmarks)
    fingerprint = hashlib.sha256(f"{key}\0{name}\0{settings}".encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE, "dylora-rows")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = config.preprocessing_num_workers or num_cores()
    workers = min(wanted, len(raw), max(raw.data.nbytes // MIN_BYTES_PER_PROCESS, 1))
    return raw.map(
        Tokenise(text_format, config, columns, benchmarks, name=name, is_raw=raw.features == RAW),
        batched=True,
        batch_size=MAP_BATCH,
        with_indices=True,
        remove_columns=raw.column_names,
        features=ROW_FEATURES,
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=fingerprint,
        desc=f"tokenising {name}",
    )


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings_key(form: TextFormat, config: DataConfig, columns: Columns | None, benchmarks: Benchmarks | None) -> str:
    """A hash of all that decides how a raw row is tokenised: the tokenizer, the settings, and this code."""
    tokenizer = form.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    modules = (
        *(contamination, encoding, templates, template_probes, control_tokens, token_rows),
        *(examples, conversations, formats, roles, pieces),
    )
    parts = [
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        str(tokenizer.chat_template),
        str(tokenizer.special_tokens_map),
        str((form.start_ids, form.begin_ids, form.response_end_id, form.text_end_id)),
        str((config.max_seq_length, config.overlong, config.loss_on)),
        str(columns),
        "" if benchmarks is None else benchmarks.key,
        *(inspect.getsource(module) for module in modules),
        Path(__file__).read_text(encoding="utf-8"),
    ]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _as_rows(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the nulls inside its lists and objects: a typed column has one for each key that others have."""
    return {name: _cleared(value) if isinstance(value, (list, dict)) else value for name, value in row.items()}


def _cleared(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cleared(item) for name, item in value.items() if item is not None}
    return [_cleared(item) for item in value] if isinstance(value, list) else value


def _row(text: _Text, encoded: Encoded | RowError) -> dict[str, Any]:
    """A tokenised row, with the columns of ROW_FEATURES."""
    document = hash64(text.document.encode("utf-8", "surrogateescape"))
    if isinstance(encoded, RowError):
        return {
            **dict.fromkeys(("prompt_length", "length", "trained", "digest", "cut"), 0),
            **{"input_ids": _NO_TOKENS, "labels": _NO_TOKENS, "document": document, "place": text.place},
            **{
                "unread": text.unread,
                "fate": int(encoded.fate),
                "reason": encoded.reason,
                "whole_length": encoded.length,
            },
        }
    input_ids, labels = np.asarray(encoded.input_ids, np.int32), np.asarray(encoded.labels, np.int32)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "prompt_length": encoded.prompt_length,
        "length": len(encoded.input_ids),
        "whole_length": encoded.whole_length,
        "trained": int((labels[1:] != encoding.IGNORED).sum()),
        "digest": hash64(input_ids.tobytes()),
        "document": document,
        "fate": int(Fate.KEPT),
        "cut": CUT_PROMPT * encoded.cut_prompt | CUT_RESPONSE * encoded.cut_response,
        "reason": encoded.note,
        "place": text.place if encoded.note else "",
        "unread": text.unread,
    }


def _shown(name: str) -> str:
    return printable(name) if len(name) <= _NAME_LENGTH else f"{printable(name[:_NAME_LENGTH])}..."


def hash64(content: bytes) -> int:
    """A 64-bit hash that is the same on every machine, as a signed number."""
    return xxhash.xxh3_64_intdigest(content) - 2**63
