"""Read the rows of a dataset as they are published, whether it is given by name, path or hub id.

A dataset of the catalog is read from the local mirror (`data_dir`) if it has it, else from an installed package or
the hub. All rows pass through the `datasets` library, so they are in memory-mapped files and a dataset may be larger
than memory.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from dylo_moe.data.config import DataConfig
from dylo_moe.data.sources.catalog import Source
from dylo_moe.data.sources.examples import RowError, printable
from dylo_moe.data.sources.files import RAW, LocalFile, content_key, is_row_file, raw_row, raw_rows
from dylo_moe.data.sources.formats import parse_json
from dylo_moe.data.sources.hub import fetch_rows
from dylo_moe.data.sources.locate import DatasetSource, chosen_columns, locate
from dylo_moe.data.sources.machine_text import read_machine_text
from dylo_moe.data.sources.roles import Columns
from dylo_moe.utils.hub import first_line
from dylo_moe.utils.words import listed

TRAIN, VALIDATION, TEST, PROMPT = "train", "validation", "test", "prompt"

_SPLIT = re.compile(
    r"(train|validation|valid|val|dev|test|prompt)(?![a-z]).*|.*[^a-z](train|validation|valid|val|dev|test)"
)

_SHARD = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?([-_.][0-9a-f]{8,})?$")

_SPLIT_NAMES = {"valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION, "eval": VALIDATION}

_DOCUMENTATION = re.compile(r"(readme|licen[cs]e|changelog|citation)(\..*)?|.*\.(md|rst)", re.IGNORECASE)

_NO_ROWS = re.compile(r"dataset_infos?\.json|state\.json")

ROWS_LOOKED_AT = 1000
"""The number of rows whose columns are looked at, where rows need not have the same columns."""


class SourceRows(NamedTuple):
    """A dataset's rows as they were found, not yet read into examples."""

    name: str
    source: Source | None
    origin: str
    """The place where the dataset was found, in words."""
    columns: Columns | None
    """None: each row is recognised by its own columns."""
    train: Dataset
    validation: Dataset | None
    left_out: int
    """The number of rows of other splits, or beyond the bound on the machine's own text."""
    key: str
    """A hash of the rows' content."""


def read_dataset(place: DatasetSource, config: DataConfig) -> SourceRows:
    """Read the rows of one dataset.

    Raises:
        ValueError: if the dataset is not available, with what to do.
    """
    source = place.source
    if source is not None and place.hub_id is None:
        return _read_machine(source)
    found = _find(place, config)
    _check_splits(place, found)
    train = found.splits[TRAIN if source is None or TRAIN in found.splits else source.splits[0]]
    columns = chosen_columns(config, place.name) if source is None else source.columns
    _check_columns(place, found.origin, train, columns)
    validation = found.splits.get(VALIDATION)
    left_out = sum(len(rows) for rows in found.splits.values()) - len(train) - len(validation or ())
    return SourceRows(place.name, source, found.origin, columns, train, validation, left_out, found.key)


def read_test(name: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of a named dataset's test split as published. Raises ValueError if it is not available."""
    return read_split(name, TEST, config)


def read_split(name: str, split: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split of a named dataset as published. Raises ValueError if it is not available."""
    found = _find(locate(name), config)
    if split not in found.splits:
        raise ValueError(
            f"the dataset {name!r} ({found.origin}) has no split {split}; it has {', '.join(found.splits)}"
        )
    for row in found.splits[split]:
        yield parse_json(row["raw"]) if found.splits[split].features == RAW else row


class _Found(NamedTuple):
    """All splits of a dataset, where they were found, and a hash of their content."""

    origin: str
    splits: dict[str, Dataset]
    key: str


def _find(place: DatasetSource, config: DataConfig) -> _Found:
    """Read all splits of a dataset from the first place that has it: its path, the mirror, a package, or the hub."""
    if place.path is not None:
        return _Found(
            f"{'folder' if place.path.is_dir() else 'file'} {place.path}", *_read_path(place.path, place.name)
        )
    mirror = None if config.data_dir is None else Path(config.data_dir).expanduser() / place.mirror_name
    if mirror is not None and mirror.is_dir():
        if place.is_revision_asked:
            raise ValueError(
                f"{place.name!r} was asked for at revision {place.revision}, and the mirror {mirror} has no revisions; "
                "leave one of them out"
            )
        return _Found(f"mirror {mirror}", *_read_files(_mirror_files(mirror, place), place.name))
    if not place.is_revision_asked and (packaged := _packaged(place.source)) is not None:
        return _Found(f"package {Path(packaged.path).parts[-3]}", *_read_files([packaged], place.name))
    hub = fetch_rows(place, config)
    origin = f"hub {place.hub_id}@{hub.commit[:10]}"
    if hub.file is not None:
        return _Found(origin, *_read_files([LocalFile.at(hub.file, hub.file.name)], place.name))
    return _Found(origin, hub.splits, "-".join(rows._fingerprint for rows in hub.splits.values()))


def _check_columns(place: DatasetSource, origin: str, train: Dataset, columns: Columns | None) -> None:
    """Check that the chosen columns exist; where rows may have different columns, the first rows are looked at.

    For a dataset of the catalog only the columns that are needed are checked, for any other all that were chosen.

    Raises:
        ValueError: for a column that no row has.
    """
    if columns is None or (place.source is not None and train.features == RAW):
        return
    found = train.column_names
    if train.features == RAW:
        found = sorted({name for row in train.select(range(min(len(train), ROWS_LOOKED_AT))) for name in _names(row)})
    chosen = [column for column in columns if column is not None]
    wanted = chosen if place.source is None else columns.needed
    absent = [column for column in wanted if column not in found]
    if absent and found:
        raise ValueError(
            f"the dataset {place.name!r} ({origin}) has no column {', '.join(absent)}; it has {', '.join(found)}"
        )


def _names(row: dict[str, Any]) -> list[str]:
    try:
        return [printable(name) for name in parse_json(row["raw"])]
    except RowError:
        return []


def _check_splits(place: DatasetSource, found: _Found) -> None:
    wanted = place.source.splits if place.source is not None else ()
    missing = [split for split in wanted if split in (TRAIN, VALIDATION) and split not in found.splits]
    if missing or (TRAIN not in found.splits and not wanted):
        raise ValueError(
            f"the dataset {place.name!r} ({found.origin}) has no split {', '.join(missing or [TRAIN])}; it has "
            f"{', '.join(found.splits)}. The name of a file says its split: train, validation, test"
        )


# Text of this machine


def _read_machine(source: Source) -> SourceRows:
    passages, left_out = read_machine_text(source.name)
    rows = []
    for passage in passages:
        content = {"text": passage.response}
        if passage.prompt is not None:
            content = {"prompt": passage.prompt, "response": passage.response}
        raw = json.dumps(content).encode()
        rows.append(raw_row(raw, passage.document, document=passage.document))
    train = Dataset.from_list(rows, features=RAW)
    return SourceRows(source.name, source, "this machine", source.columns, train, None, left_out, train._fingerprint)


def _packaged(source: Source | None) -> LocalFile | None:
    """The source's file in an installed package, if there is one; the package's code is not run."""
    if source is None or source.package is None:
        return None
    package, inner = source.package
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations)), inner)
    return LocalFile.at(path, f"test-{path.name}") if path.is_file() else None


# Files


def _read_path(path: Path, name: str) -> tuple[dict[str, Dataset], str]:
    if path.is_file():
        return _read_files([LocalFile.at(path, path.name)], name, split=TRAIN)
    files = _files_below(path)
    others = [file for file in files if not is_row_file(file.name)]
    if _data_files(files) and all(_DOCUMENTATION.fullmatch(Path(file.name).name) for file in others):
        return _read_files(_data_files(files), name)  # among sources, a .json file is a source
    if not files:
        raise ValueError(f"the folder {str(path)!r} has no file to read")
    texts, key = _generated(files, name, as_texts=True)
    return {TRAIN: texts}, key


def _files_below(folder: Path) -> list[LocalFile]:
    """The files of a folder, sorted by name; hidden files, hidden folders and caches are left out, links followed.

    Raises:
        ValueError: for a link to nothing, and for one that leads in a circle.
    """
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        if os.path.realpath(parent) in {os.path.realpath(above) for above in Path(parent).parents}:
            raise ValueError(f"the link {parent!r} leads in a circle; remove it")
        for name in names:
            path = Path(parent, name)
            if path.is_symlink() and not path.exists():
                raise ValueError(f"the link {str(path)!r} leads to nothing; remove it")
            if path.is_file() and not name.startswith("."):
                parts = path.relative_to(folder).parts
                found.append((parts, LocalFile.at(path, "/".join(parts))))
    return [file for _, file in sorted(found)]


def _data_files(files: Sequence[LocalFile]) -> list[LocalFile]:
    return [file for file in files if is_row_file(file.name) and not _NO_ROWS.fullmatch(Path(file.name).name)]


def _mirror_files(folder: Path, place: DatasetSource) -> list[LocalFile]:
    """The data files of a dataset's folder in a mirror, whose files may be arranged as on the hub or in any other
    way."""
    if place.config is not None and (folder / place.config).is_dir():
        folder = folder / place.config
    elif place.config is not None and place.source is None:
        raise ValueError(f"the mirror {str(folder)!r} has no folder {place.config}, which was asked for")
    files = _data_files(_files_below(folder))
    only = [file for file in files if place.source is not None and file.name == place.source.file]
    if not files:
        raise ValueError(f"the mirror {str(folder)!r} has no parquet, json or jsonl file")
    return only or files


def split_of(name: str) -> str:
    """The split of a file by its name (`train-...`, `mine_test`), else by that of a folder above it, else "train"."""
    *folders, own = name.lower().removesuffix(".gz").split("/")
    stem = _SHARD.sub("", own.rpartition(".")[0])
    if found := _SPLIT.fullmatch(stem):
        split = found[1] or found[2]
    elif stem in _SPLIT_NAMES:  # as a part of a longer name "eval" says what is evaluated
        split = stem
    else:
        known = [folder for folder in folders if folder in (TRAIN, VALIDATION, TEST, *_SPLIT_NAMES)]
        split = known[-1] if known else TRAIN
    return _SPLIT_NAMES.get(split, split)


def _read_files(files: Sequence[LocalFile], name: str, *, split: str | None = None) -> tuple[dict[str, Dataset], str]:
    """Read files of rows into their splits, and hash their content."""
    groups: dict[str, list[LocalFile]] = {}
    for file in files:
        groups.setdefault(split or split_of(file.name), []).append(file)
    splits: dict[str, Dataset] = {}
    keys = []
    for group, members in groups.items():
        columnar = [file for file in members if file.name.lower().endswith(".parquet")]
        if columnar and len(columnar) < len(members):
            raise ValueError(
                f"the dataset {name!r} has parquet and other files for its split {group}; keep one kind: "
                f"{', '.join(file.name for file in members)}"
            )
        splits[group], key = _parquet(columnar, name) if columnar else _generated(members, name)
        keys.append(key)
    return splits, "-".join(keys)


def _generated(files: Sequence[LocalFile], name: str, *, as_texts: bool = False) -> tuple[Dataset, str]:
    """Read files into raw rows, which `datasets` caches under a hash of the files' content."""
    key = f"{content_key(files)}{'t' if as_texts else 'r'}"
    plain = [(file.name, file.path) for file in files]
    if next(raw_rows(plain, as_texts), None) is None:
        raise ValueError(_no_row(name, files))
    rows = Dataset.from_generator(
        raw_rows,
        features=RAW,
        gen_kwargs={"files": plain, "as_texts": as_texts},
        fingerprint=key,
        writer_batch_size=100,
    )
    return rows, key


def _no_row(name: str, files: Sequence[LocalFile]) -> str:
    paths = listed([file.path for file in files])
    return f"the dataset {name!r} has no row in {paths}: 0 rows were read there, and at least two are needed"


def _parquet(files: Sequence[LocalFile], name: str) -> tuple[Dataset, str]:
    key = content_key(files)
    paths = []
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file.path) as opened:
                if opened.metadata.num_rows:
                    paths.append(glob.escape(file.path))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"{file.path!r} is not a complete parquet file: {first_line(error)}") from error
    if not paths:
        raise ValueError(_no_row(name, files))
    # The cache of `datasets` would recognise a file by its time; a folder of our own recognises it by its content.
    cache = Path(datasets.config.HF_DATASETS_CACHE, "dylora-parquet", key)
    try:
        rows = load_dataset("parquet", data_files=paths, split="train", cache_dir=str(cache))
    except (DatasetGenerationError, pyarrow.ArrowException, ValueError, OSError) as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"the parquet files of {name!r} cannot be read together: {reason}") from error
    return rows, key
