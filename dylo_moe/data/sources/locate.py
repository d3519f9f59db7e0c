"""Resolve the datasets of a run: names of the catalog, paths and hub ids, and the columns chosen for them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from dylo_moe.data.config import DataConfig
from dylo_moe.data.sources.catalog import CATALOG, Source
from dylo_moe.data.sources.files import is_row_file
from dylo_moe.data.sources.roles import Columns
from dylo_moe.utils.words import nearest

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


class DatasetSource(NamedTuple):
    """The source that the argument for a dataset stands for."""

    name: str
    """The name of the dataset in messages, files and shares."""
    source: Source | None = None
    path: Path | None = None
    hub_id: str | None = None
    config: str | None = None
    revision: str | None = None
    is_revision_asked: bool = False
    """Whether the user asked for the revision, so that only the hub can have it."""

    @property
    def mirror_name(self) -> Path:
        """The dataset's folder in a mirror: its name, or OWNER/NAME of a hub id."""
        return Path(self.name if self.source is not None or self.hub_id is None else self.hub_id)


def locate(argument: str, *, named: Collection[str] = CATALOG) -> DatasetSource:
    """Resolve the argument for one dataset: a name of the catalog, a path, or a hub id.

    Args:
        named: the names of the catalog that the answer to an unknown one offers.

    Raises:
        ValueError: if it is none of these, with the nearest known name where one is near.
    """
    name, at, revision = argument.partition("@")
    if name in CATALOG and bool(at) == bool(revision):
        source = CATALOG[name]
        if revision and source.hub_id is None:
            raise ValueError(f"{name!r} is text of this machine and has no revision; leave @{revision} out")
        return DatasetSource(
            name, source, None, source.hub_id, source.config, revision or source.revision, bool(revision)
        )
    try:
        path = Path(argument).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{argument[:80]!r} cannot be a path: {error}") from error
    if exists:
        stem = Path(os.path.abspath(path)).name
        while is_row_file(stem) or (path.is_file() and "." in stem[1:]):
            stem = stem.rpartition(".")[0]
        return DatasetSource(stem, path=path)
    if is_row_file(argument) or argument.startswith(("/", "./", "../", "~")) or argument.count("/") > 1:
        raise ValueError(f"there is no file or folder {str(path)!r}; correct the path")
    if found := _HUB_ID.fullmatch(argument):
        asked = found["revision"] is not None
        return DatasetSource(
            found["id"].partition("/")[2], None, None, found["id"], found["config"], found["revision"], asked
        )
    word = name.lower()
    starts = {known[: len(word)]: known for known in reversed([*named])}  # "pyton" is like the start of a longer name
    near = nearest(word, named) or starts.get(nearest(word, starts) or "")
    raise ValueError(
        f"unknown dataset {argument!r}; {f'the nearest known one is {near!r}. ' if near else ''}"
        f"{'Known' if near else 'known'} are {', '.join(named)}, the path of any file or folder, and any hub id "
        "(OWNER/NAME)"
    )


def locate_all(config: DataConfig, *, named: Collection[str] = CATALOG) -> list[DatasetSource]:
    """Resolve every dataset of a config.

    Args:
        named: the names of the catalog that the answer to an unknown one offers.

    Raises:
        ValueError: for wrong names, columns or shares; one message holds all problems.
    """
    problems, places = [], []
    for argument in config.datasets:
        try:
            places.append(locate(argument, named=named))
        except ValueError as error:
            problems.append(str(error))
    places = _told_apart(places)
    names = [place.name for place in places]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(f"datasets holds {name!r} {names.count(name)} times; each needs a name of its own")
    if len(places) == len(config.datasets):
        own = {place.name for place in places if place.source is None}
        problems += _column_problems(config, names, own)
        if config.mix and set(config.shares) != set(names):
            problems.append(
                f"mix names {', '.join(config.shares)}, but the datasets are {', '.join(names)}; give each one a share"
            )
    if config.data_dir is not None and not Path(config.data_dir).expanduser().is_dir():
        problems.append(f"data_dir is {config.data_dir!r}; there is no such folder")
    if problems:
        raise ValueError("; ".join(problems))
    return places


def _told_apart(places: Sequence[DatasetSource]) -> list[DatasetSource]:
    """Name paths that would have the same name by their folders too.

    A/train.jsonl and B/train.jsonl become A and B; A/notes.txt and B/notes.txt become A-notes and B-notes.
    """
    names = [place.name for place in places if place.path is not None]
    told = []
    for place in places:
        folder = "" if place.path is None else Path(os.path.abspath(place.path)).parent.name
        if folder and names.count(place.name) > 1:
            place = place._replace(name=folder if place.name == "train" else f"{folder}-{place.name}")
        told.append(place)
    return told


def locate_for_training(config: DataConfig) -> list[DatasetSource]:
    """Resolve every dataset of a config that is trained on.

    Raises:
        ValueError: as `locate_all`, and for a dataset that is for evaluation only.
    """
    places = locate_all(config, named=[source.name for source in CATALOG.values() if source.for_training])
    refused = [place.name for place in places if place.source is not None and not place.source.for_training]
    if refused:
        verb, it = ("is", "it") if len(refused) == 1 else ("are", "them")
        raise ValueError(
            f"{', '.join(refused)} {verb} for evaluation only, and never trained on; leave {it} out of datasets"
        )
    return places


def _column_problems(config: DataConfig, names: Sequence[str], own: set[str]) -> list[str]:
    problems = []
    roles = [(choice.dataset, choice.role) for choice in config.column_choices]
    problems += [
        f"columns gives {role} twice"
        for role in dict.fromkeys(role for own, role in roles if roles.count((own, role)) > 1)
    ]
    for choice in config.column_choices:
        if choice.dataset is not None and choice.dataset not in names:
            problems.append(f"columns is for {choice.dataset!r}, which is not among the datasets ({', '.join(names)})")
        elif choice.dataset is not None and choice.dataset not in own:
            problems.append(f"columns cannot apply to {choice.dataset!r}: the columns of a named dataset are known")
        elif not own:
            problems.append("columns cannot apply: the columns of named datasets are known")
    for name in sorted(own):
        chosen = chosen_columns(config, name)
        if chosen is not None and (problem := chosen.problem()):
            problems.append(f"columns of {name!r}: {problem}")
    return problems


def chosen_columns(config: DataConfig, name: str) -> Columns | None:
    """The columns that a config chooses for a dataset; None: each row is recognised by its own columns."""
    roles: dict[str, str] = {}
    for dataset in (None, name):  # a choice for one dataset overrides that for all
        roles |= {choice.role: choice.column for choice in config.column_choices if choice.dataset == dataset}
    return Columns(**roles) if roles else None
