"""The held-out rows on which a checkpoint is evaluated: by default exactly those of its training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.config import DataConfig
from dylo_moe.data.encoding import text_format
from dylo_moe.data.loading import LoadedData, load_data
from dylo_moe.data.tokenized import TokenizedDataset, tokenise_all
from dylo_moe.data.tokenizing import hash64
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.training.resume import data_changes

HELD_OUT = "held-out rows"
"""The end of a fingerprint's keys for held-out rows."""


class HeldOut(NamedTuple):
    """Rows to evaluate a model on. Each has `input_ids`, `labels`, `length` and `domain`."""

    rows: dict[str, Dataset]
    """The held-out rows of each dataset."""
    documents: dict[str, list[str]]
    """The document of each of these rows: rows of one file, or with one question, have the same. In a dataset that is
    one document, every row counts as a document of its own."""
    notes: list[str]
    """What a reader of the losses should know, in sentences."""


def held_out(
    checkpoint: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    datasets: list[str] | None = None,
    data_dir: str | None = None,
    eval_subset: float | None = None,
    seed: int = 0,
    for_search: bool = False,
) -> HeldOut:
    """Load the rows to evaluate a checkpoint on.

    Args:
        checkpoint: the folder of the checkpoint.
        tokenizer: the tokenizer of its base.
        datasets: other data than the run's; None: the held-out rows of the run itself, and no others.
        data_dir: the mirror in which the data is now; None: the run's.
        eval_subset: percent of the held-out rows to use; None: as in the run.
        seed: the seed of the split, for a checkpoint that has no settings of a run.
        for_search: load the rows that the run kept for a search of settings instead of those that it held out.

    Raises:
        ValueError: without `datasets`, if the checkpoint is not from a run of `dylora train` or its data has changed;
            for data that cannot be read.
    """
    record = read_manifest(checkpoint).get("training") or {}
    settings = run_settings(record)
    if settings is None and datasets is None:
        raise ValueError(
            f"{checkpoint} does not say which rows were held out (it is not from dylora train); name the data "
            "with --datasets"
        )
    config = data_config(settings or {}, datasets=datasets, data_dir=data_dir, eval_subset=eval_subset)
    data = load_data(config, tokenizer, seed=seed if settings is None else settings["seed"])
    notes = []
    if datasets is None:
        trained = record | {"data": _comparable(record["data"], eval_subset)}
        differences = data_changes(trained, _comparable(data.fingerprint, eval_subset), data.names)
        if differences:
            raise ValueError(
                f"the data of {checkpoint} is not what it was when it was trained: {'; '.join(differences)}. Give "
                "--data_dir if it is elsewhere now, or evaluate on the data that is here with --datasets"
            )
        if eval_subset is not None:
            notes.append(f"The rows are {eval_subset:g} % of each dataset's held-out rows, by --eval_subset.")
    else:
        notes.append(_of_other_data(settings, config))
    rows = data.search if for_search else data.evaluation
    return HeldOut(rows, _documents(data, rows, config, tokenizer), notes)


def run_settings(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of `dylora train` in a manifest's record of training; None for a stream, or without a run."""
    settings = record.get("settings") or {}
    return settings if "num_experts" in settings and "data" in record else None


def data_config(
    settings: Mapping[str, Any], *, datasets: list[str] | None, data_dir: str | None, eval_subset: float | None
) -> DataConfig:
    """The data settings of a run, overridden by those that are given."""
    values = {item.name: settings[item.name] for item in fields(DataConfig) if item.name in settings}
    if datasets is not None:
        mixing = (
            "mix",
            "interleaved_sampling",
        )  # they name datasets that may be missing here, where nothing is trained
        values = {name: value for name, value in values.items() if name not in mixing} | {"datasets": list(datasets)}
    if data_dir is not None:
        values["data_dir"] = data_dir
    if eval_subset is not None:
        values["eval_subset"] = float(eval_subset)
    return DataConfig(**values)


def _comparable(fingerprint: Mapping[str, str], eval_subset: float | None) -> dict[str, str]:
    """The entries of a fingerprint that must be equal: with `eval_subset` only those of the training rows."""
    return {key: value for key, value in fingerprint.items() if eval_subset is None or not key.endswith(HELD_OUT)}


def _of_other_data(settings: Mapping[str, Any] | None, config: DataConfig) -> str:
    if settings is None:
        return "The checkpoint does not say what it was trained on: some of these rows may be among it."
    trained = ", ".join(settings["datasets"])
    return (
        f"The data is that of --datasets. The checkpoint was trained on {trained}; a dataset that is in both is split "
        "with the run's seed, so that what is held out here was held out there."
    )


def _documents(
    data: LoadedData, rows: Mapping[str, Dataset], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[str]]:
    """The document of each of some rows of the data, found by the hash of the row's ids."""
    tables = tokenise_all(data.readings, text_format(tokenizer), config, None)  # from the cache of `load_data`
    return {table.name: _of_rows(table, rows[table.name]) for table in tables}


def _of_rows(table: TokenizedDataset, rows: Dataset) -> list[str]:
    digests = np.array([hash64(np.asarray(row["input_ids"], np.int32).tobytes()) for row in rows], np.int64)
    if table.is_one_document:
        return [str(digest) for digest in digests]
    known, documents = table.digests[table.good], table.documents[table.good]
    order = np.argsort(known)
    places = order[np.searchsorted(known[order], digests)]
    return [str(document) for document in documents[places]]
