"""The folder of an evaluation: its settings, with which alone it can be resumed, and its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dylo_moe.evaluation.arguments import LOSSES, EvalArguments
from dylo_moe.evaluation.samples import SampleFile
from dylo_moe.utils.atomic_files import write_json, write_whole
from dylo_moe.utils.differences import Difference, differences
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.settings_folder import Settings, check_folder, take_folder

RESULTS_FILE = "results.json"

EVALUATIONS = "evaluation"
"""The folder, beside a run's checkpoints, of the evaluations of each."""


def evaluation_folder(checkpoint: Path, options: EvalArguments) -> Path:
    """The folder for the results: `output_dir`, or else evaluation/NAME beside the checkpoint.

    It is not inside the checkpoint, which may hold no other files. Several checkpoints of a run, and several experts of
    a checkpoint, each have a folder of their own.
    """
    if options.output_dir is not None:
        return Path(options.output_dir)
    folder = checkpoint.resolve()
    name = folder.name if options.expert is None else f"{folder.name}-{options.expert}"
    return folder.parent / EVALUATIONS / name


def rename_evaluations(run: Path, names: Mapping[str, str]) -> None:
    """Rename evaluations of a run together with the checkpoints that they are of, so that they can be resumed.

    Args:
        names: the new name of each checkpoint, by its old one.
    """
    for before, after in names.items():
        if (run / EVALUATIONS / before).is_dir():
            (run / EVALUATIONS / before).rename(run / EVALUATIONS / after)


def evaluation_settings(checkpoint: Path, options: EvalArguments, *, bf16: bool, device: str) -> Settings:
    """All settings that the results depend on, in groups; only the groups that the evaluation uses are there."""

    def group(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    model = {"checkpoint": manifest, "bf16": bf16, "device": device}
    settings: Settings = {"model": model | group("expert", "batch_size", "seed")}
    if LOSSES in options.tasks:
        settings[LOSSES] = group("datasets", "eval_subset")
    if options.benchmarks:
        settings["code"] = group("prompt", "limit", "max_new_tokens", "sandbox", "timeout_seconds", "memory_mib")
    if options.num_samples:
        settings["sampled"] = group("num_samples", "temperature", "top_p")
    return settings


def check_evaluation_folder(folder: Path, settings: Settings) -> None:
    """Check that an evaluation with these settings can begin in a folder, or go on there; nothing is written.

    Settings of tasks of which nothing was measured yet do not count: that evaluation failed, or was refused.

    Raises:
        ValueError: if it holds something else, or an evaluation with other settings; each difference is named.
    """
    check_folder(folder, settings, **_rules(folder))


def take_evaluation_folder(folder: Path, settings: Settings) -> None:
    """Make the folder of an evaluation and save its settings, after `check_evaluation_folder`."""
    take_folder(folder, settings, **_rules(folder))


def _rules(folder: Path) -> dict[str, Any]:
    measured = _measured(folder)

    def bound(before: Settings) -> Settings:
        return {group: values for group, values in before.items() if group in measured}

    return {
        "what": "evaluation",
        "changes": lambda before, now: _changes(bound(before), now),
        "merge": lambda before, now: _merge(bound(before), now),
    }


def _measured(folder: Path) -> set[str]:
    """The groups of settings with which something in a folder was measured."""
    groups = {LOSSES} if LOSSES in read_results(folder) else set()
    answers = [file.name for file in folder.glob("*.jsonl") if file.stat().st_size]
    if answers:
        groups |= {"code", "problems"}
    if any("sampled" in name for name in answers):
        groups.add("sampled")
    return groups | {"model"} if groups else groups


def _changes(before: Settings, now: Settings) -> list[Difference]:
    """Settings that both have and that differ: a group that one of them lacks is of tasks that it has not done."""
    pairs = [(before[group], now[group]) for group in now if group in before]
    return [item for was, wanted in pairs for item in differences(_shared(was, wanted), _shared(wanted, was))]


def _shared(values: Settings, others: Settings) -> Settings:
    return {name: value for name, value in values.items() if name in others}


def _merge(before: Settings, now: Settings) -> Settings:
    return {name: {**before.get(name, {}), **values} for name, values in (before | now).items()}


def read_results(folder: Path) -> dict[str, Any]:
    """The results that the folder holds so far."""
    path = folder / RESULTS_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def add_result(folder: Path, keys: tuple[str, ...], value: Any) -> None:
    """Put a value into results.json under nested keys, and keep the results of other tasks."""
    results = read_results(folder)
    place = results
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    write_json(folder / RESULTS_FILE, results)


def export_evalplus(samples: SampleFile) -> Path:
    """Write samples in the format of EvalPlus: each line holds a task_id and the solution, a whole program.

    EvalPlus is Liu et al. 2023, arXiv:2305.01210; the file is for `evalplus.evaluate --samples`.
    """
    path = samples.path.with_name(f"{samples.path.stem}-evalplus.jsonl")
    lines = [json.dumps({"task_id": sample.task_id, "solution": sample.solution}) for sample in samples.samples]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    return path
