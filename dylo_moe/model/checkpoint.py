"""The format of a checkpoint folder, and its verification.

    dylora.json                      format, base and its fingerprint, router, experts, sha256 of every other file
    experts/NAME/adapter_config.json, adapter_model.safetensors      what stock PEFT reads
    router.safetensors
    skill_library.safetensors        of a model that knows its skills: their statistics, never their text
    README.md                        the model card
    adapter_model.safetensors        empty, in folders of the stock Trainer, which looks for a file of that name
    optimizer.pt, scheduler.pt, ...  of a training checkpoint: what the Trainer needs to resume

Weights are safetensors only, the base is never in it. saving.py writes such folders, loading.py reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig

from dylo_moe.model.manifest import (
    FORMAT_VERSION,
    SHARED_FORMAT_VERSION,
    expert_entries,
    expert_problem,
    format_version,
)
from dylo_moe.model.manifest_check import checksum_problem, manifest_problems
from dylo_moe.utils.atomic_files import files_below, sha256
from dylo_moe.utils.errors import DyLoRAWarning
from dylo_moe.utils.file_names import MANIFEST, RESULT
from dylo_moe.utils.locks import is_held
from dylo_moe.utils.typed_json import read_json
from dylo_moe.utils.whole_folders import LOCK, NEW, hidden_of, left_by_kill

ROUTER_FILE = "router.safetensors"

LIBRARY_FILE = "skill_library.safetensors"

CARD = "README.md"

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

OWN_ENTRIES = ("experts", ROUTER_FILE, LIBRARY_FILE, ADAPTER_FILES[1], MANIFEST)

TRAINER_FILES = ("trainer_state.json", "training_args.bin")
"""A folder with one of these files, and without a record of a training in `dylora.json`, was written by the stock
Trainer, whose own files may be beside ours."""


class CheckpointError(ValueError):
    """A checkpoint is incomplete, or not for this base; the message names every problem found."""


def checkpoint_in(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a path means: the folder itself, or, of a run or a stream that has ended, its checkpoint.

    Raises:
        CheckpointError: for the folder of a run that has not ended, with the checkpoints that it has.
    """
    folder = Path(path)
    for place in (folder, folder / RESULT):
        older = left_by_kill(place)
        if older is not None and (older / MANIFEST).is_file():
            text = (
                f"a save over {place} was interrupted; what was there before is {older}, and the next save puts it back"
            )
            warnings.warn(text, DyLoRAWarning, stacklevel=2)
            return older
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        finish_move(folder)
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return folder
    if (folder / RESULT / MANIFEST).is_file():
        return folder / RESULT
    others = sorted(folder.glob(f"*/{MANIFEST}")) + sorted(folder.glob(f"*/*/{MANIFEST}"))
    if others:
        newest = max(others, key=lambda file: file.stat().st_mtime).parent
        raise CheckpointError(
            f"{folder} has no checkpoint of a run that has ended; its newest one is {newest}: name that"
        )
    return folder


def move_in(aside: Path, target: Path) -> None:
    """Move a checkpoint's files into a folder that holds others too, the manifest last: a folder without it is no
    checkpoint.

    What was moved by a call that was killed is left as it is, so that another call with the same folders ends the work.
    """
    listed = {name.split("/")[0] for name in json.loads((aside / MANIFEST).read_text(encoding="utf-8"))["files"]}
    (target / MANIFEST).unlink(missing_ok=True)
    for name in OWN_ENTRIES:
        is_here = (aside / name).exists()
        if is_here or name not in listed:
            if (target / name).is_dir():
                shutil.rmtree(target / name)
            else:
                (target / name).unlink(missing_ok=True)
        if is_here:
            os.replace(aside / name, target / name)


def finish_move(folder: Path) -> None:
    """End what `move_in` had begun, before it was killed, in a folder without a manifest."""
    for hidden in hidden_of(folder, folder):
        if (hidden / NEW / MANIFEST).is_file() and not ((hidden / LOCK).exists() and is_held(hidden / LOCK)):
            move_in(hidden / NEW, folder)
            shutil.rmtree(hidden, ignore_errors=True)
            warnings.warn(f"a save into {folder} was interrupted; it was finished", DyLoRAWarning, stacklevel=3)
            return


def read_manifest(path: str | os.PathLike[str], *, strict: bool = True) -> dict[str, Any]:
    """The verified manifest of a checkpoint folder.

    Args:
        path: the folder, or that of a run or a stream that has ended.
        strict: refuse files that the manifest does not know. The stock Trainer puts files of its own beside ours,
            which no manifest lists; in a folder of that kind it cannot apply.

    Raises:
        CheckpointError: naming every missing, extra, altered or unreadable file.
    """
    folder = checkpoint_in(path)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is no DyLoRA-MoE checkpoint: {MANIFEST} is missing")
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    _check_content(manifest, folder / MANIFEST)
    wanted = {f"experts/{entry['name']}/{file}" for entry in expert_entries(manifest) for file in ADAPTER_FILES}
    wanted |= {ROUTER_FILE} | ({LIBRARY_FILE} if manifest.get("growth") is not None else set())
    files = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
    by_stock = "training" not in manifest and any((folder / name).is_file() for name in TRAINER_FILES)
    problems = _file_problems(folder, files, strict=strict and not by_stock)
    problems += [f"{name} is not listed in {MANIFEST}" for name in sorted(wanted - files.keys())]
    if problems:
        raise CheckpointError(f"checkpoint {folder} is not whole: " + "; ".join(problems))
    return manifest


def _check_content(manifest: Any, path: Path) -> None:
    """Raise CheckpointError unless a manifest is of a format that is known here, as it was written, and adds up."""
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version not in (FORMAT_VERSION, SHARED_FORMAT_VERSION):
        raise CheckpointError(_other_format(path, version))
    problem = None if not isinstance(manifest, dict) else checksum_problem(manifest, path)
    problems = [problem] if problem else manifest_problems(manifest)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path} cannot be used: {'; '.join(problems[:5])}{more}")
    if version != format_version(manifest):
        raise CheckpointError(_other_format(path, version))


def _other_format(path: Path, version: Any) -> str:
    return (
        f"{path} has format {version!r}; this version reads {FORMAT_VERSION}, and {SHARED_FORMAT_VERSION} with a "
        "shared expert"
    )


def manifest_or_problem(
    path: str | os.PathLike[str], problems: Sequence[str], *, expert: str | None = None, or_base: bool = True
) -> dict[str, Any]:
    """The verified manifest of a checkpoint for a command that has checked its flags and loads weights next.

    Args:
        path: the checkpoint's folder.
        problems: what is wrong with the flags.
        expert, or_base: the arguments of `expert_problem`.

    Raises:
        ValueError: where there are problems, the checkpoint cannot be read, or it has no such expert; one message holds
            all of them.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        if not problems:
            raise
        raise ValueError("; ".join([*problems, str(error)])) from error
    unknown = expert_problem(manifest, expert, or_base=or_base)
    if problems or unknown:
        raise ValueError("; ".join([*problems, *([unknown] if unknown else [])]))
    return manifest


def named_base(path: str | os.PathLike[str], manifest: dict[str, Any]) -> tuple[str, str | None]:
    """The name and the revision of a checkpoint's base.

    Args:
        path: the checkpoint's folder, for the message.

    Raises:
        CheckpointError: for a checkpoint whose base had no name.
    """
    base = manifest["base"]
    if not base["id"]:
        raise CheckpointError(f"checkpoint {path} does not name its base, so only Python can load it: pass base=")
    return base["id"], base["revision"]


def _file_problems(folder: Path, files: dict[str, tuple[str, int]], *, strict: bool) -> list[str]:
    problems = []
    for name, (digest, size) in files.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, was written with {size}")
        elif sha256(file) != digest:
            problems.append(f"{name} was altered: its sha256 is not the one in {MANIFEST}")
    present = files_below(folder, "." if strict else "experts")
    problems += [f"{name} does not belong to it" for name in sorted(present - files.keys() - {MANIFEST})]
    return problems


def plain_config(config: PeftConfig) -> dict[str, Any]:
    """A LoRA config as JSON holds it, sets in one order."""
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return json.loads(json.dumps(values, default=str))
