"""What a run resumes from, and whether its settings, data and parameters are those of the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.data.loading import LoadedData
from dylo_moe.model.checkpoint import CheckpointError, read_manifest
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.training.run_folder import CONFIG_FILE, NUMBERED, RUNS, STREAM_FILE, checkpoints_in
from dylo_moe.training.saved_state import STATE_FILE, read_settings, read_trainer_state
from dylo_moe.utils.differences import Difference, differences
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.words import counted

LATEST = "latest"

AUTO = "auto"

LOCATIONS = ("model", "datasets", "data_dir", "columns", "preprocessing_num_workers")
"""Settings that name places, which may have moved; the base and the rows themselves are compared instead."""

MAY_CHANGE = (  # noqa: SIM905
    "output_dir num_train_epochs max_steps per_device_eval_batch_size load_best_model_at_end metric_for_best_model "
    "greater_is_better early_stopping_patience early_stopping_threshold report_to run_name project use_cpu tf32 "
    "attn_implementation loss_chunk_size gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
    "activation_checkpointing_kwargs eval_benchmark eval_benchmark_steps allow_code_execution sandbox"
).split()
"""Settings that may differ when a run is resumed. More epochs or steps stretch what is left of the learning rate's
schedule; another device, attention, chunk of the loss, gradient checkpointing or number of processes may round
differently."""

MAY_CHANGE_PREFIXES = (
    "logging_",
    "eval_s",
    "eval_d",
    "save_",
    "dataloader_num",
    "dataloader_p",
    "log_",
    "torch_empty",
    "ddp_",
)

ROWS_EACH, TURNS = "per_device_train_batch_size", "gradient_accumulation_steps"
"""These two, times the number of processes, are the rows of an optimizer step; only the product has to stay."""


class Resumption(NamedTuple):
    """What a run resumes from."""

    run: Path
    """The run's folder."""
    checkpoint: Path | None
    """None: the run was interrupted before its first checkpoint, so it starts at its beginning."""
    settings: dict[str, Any]
    """Its settings, as a recipe."""
    record: dict[str, Any]
    """The manifest's record of the training; empty without a checkpoint."""
    broken: tuple[str, ...] = ()
    """Newer checkpoints that are incomplete or altered, each with what is wrong; only "auto" passes them over."""


def named_run(wanted: str, output_dir: str | None, can_be_resumed: Callable[[Path], bool]) -> Path | None:
    """The folder that `--resume_from_checkpoint` means.

    Args:
        wanted: "latest", "auto", or a folder, which is returned as it is.
        output_dir: as typed; "latest" and "auto" mean the run there. Without it "latest" is the newest run in runs.
        can_be_resumed: whether a folder holds a run of this command that can go on.

    Returns:
        None where "auto" finds no run, so that a new one starts.

    Raises:
        CheckpointError: where there is no such folder, or no run in it.
    """
    if wanted not in (LATEST, AUTO, "True", "true"):
        if not Path(wanted).is_dir():
            raise CheckpointError(f"there is no checkpoint and no run {wanted}")
        return Path(wanted)
    if output_dir is None and wanted == AUTO:
        raise CheckpointError("--resume_from_checkpoint auto needs --output_dir, the folder of the run")
    if output_dir is None:
        found = [path for path in RUNS.iterdir() if can_be_resumed(path)] if RUNS.is_dir() else []
        if not found:
            raise CheckpointError(
                f"--resume_from_checkpoint finds no run in {RUNS}, where runs are written unless --output_dir says "
                "otherwise; give the folder of the run"
            )
        return max(found, key=lambda path: (path / CONFIG_FILE).stat().st_mtime)
    run = Path(output_dir)
    if can_be_resumed(run):
        return run
    if wanted == AUTO and not (run.exists() and any(run.iterdir())):
        return None
    raise CheckpointError(f"there is no run in {run} to resume; look at --output_dir, or start a new run")


def is_resumable_run(folder: Path) -> bool:
    """Whether a folder holds a run of `dylora train` that can be resumed: its settings, and no stream."""
    return (folder / CONFIG_FILE).is_file() and not (folder / STREAM_FILE).is_file()


def find(wanted: str, output_dir: str | None) -> Resumption | None:
    """Find what `--resume_from_checkpoint` names.

    Args:
        wanted: "latest", "auto", a run's folder or a checkpoint's. "auto" takes the newest complete checkpoint.
        output_dir: as typed; "latest" and "auto" look there.

    Returns:
        None where "auto" finds no run, so that a new one starts.

    Raises:
        CheckpointError: where there is nothing to resume from, or it is incomplete or altered.
    """
    run = named_run(wanted, output_dir, is_resumable_run)
    if run is None:
        return None
    if (run / MANIFEST).is_file() or NUMBERED.fullmatch(run.name):
        return _from_checkpoint(run)
    if not is_resumable_run(run):
        if (run / STREAM_FILE).is_file():
            raise CheckpointError(f"{run} is a stream: resume it with `dylora stream --resume_from_checkpoint {run}`")
        raise CheckpointError(f"{run} is neither a checkpoint (no {MANIFEST}) nor a run (no {CONFIG_FILE})")
    broken: list[str] = []
    for _, checkpoint in reversed(checkpoints_in(run)):
        try:
            return _from_checkpoint(checkpoint)._replace(broken=tuple(broken))
        except CheckpointError as error:
            if wanted != AUTO:  # "auto" is for jobs that restart by themselves; a person is asked to decide
                raise
            broken.append(str(error))
    return Resumption(run, None, read_settings(run / CONFIG_FILE), {}, tuple(broken))


def _from_checkpoint(folder: Path) -> Resumption:
    record = read_manifest(folder).get("training")
    if not record or "settings" not in record or not (folder / STATE_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds experts and router only, and nothing to resume training from (no optimizer, no settings); "
            "give the run's folder, or a folder named checkpoint-STEP"
        )
    absent = [name for name in ("data", "losses_before", "step", "trainable") if name not in record]
    if absent:
        raise CheckpointError(f"{folder} cannot be resumed: its record of the training has no {', '.join(absent)}")
    read_trainer_state(folder)
    return Resumption(folder.parent, folder, record["settings"], record)


def shared_out(resumed: Resumption, num_processes: int) -> dict[str, Any]:
    """The settings of a checkpoint for another number of processes, which share the rows of a step among them.

    Each process takes as many rows at once as before, or the next smaller number that divides its share evenly.

    Raises:
        CheckpointError: where no number does.
    """
    settings, before = resumed.settings, resumed.record.get("world_size", 1)
    if num_processes == before or ROWS_EACH not in settings:
        return settings
    at_once, turns = settings[ROWS_EACH], settings.get(TURNS, 1)
    total = at_once * turns * before
    if total % num_processes:
        fitting = [str(number) for number in range(1, total + 1) if total % number == 0]
        raise CheckpointError(
            f"{resumed.checkpoint} was trained with {counted(total, 'row')} a step, which {num_processes} processes "
            f"cannot share evenly; resume with {', '.join(fitting[:8])}{' or more' if len(fitting) > 8 else ''}"
        )
    each = total // num_processes
    at_once = next(number for number in range(min(at_once, each), 0, -1) if each % number == 0)
    return {**settings, ROWS_EACH: at_once, TURNS: each // at_once}


def changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, processes: tuple[int, int] = (1, 1)
) -> tuple[list[str], list[str]]:
    """Settings that differ: those that may not, and those that may, in words.

    Args:
        processes: how many there were, and are.
    """
    rows = [settings.get(ROWS_EACH, 1) * settings.get(TURNS, 1) for settings in (saved, now)]
    is_same_step = rows[0] * processes[0] == rows[1] * processes[1]
    refused: list[str] = []
    allowed: list[str] = []
    for difference in differences(saved, now):
        name = difference.name
        if name in LOCATIONS:
            continue
        free = (
            name in MAY_CHANGE or name.startswith(MAY_CHANGE_PREFIXES) or (name in (ROWS_EACH, TURNS) and is_same_step)
        )
        (allowed if free else refused).append(str(difference))
    return refused, allowed


def data_changes(record: Mapping[str, Any], now: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """How rows differ from those of a checkpoint: a phrase for each difference, with the dataset's name.

    A dataset may have another name than before where it is in the same place and has the same rows.

    Args:
        record: the checkpoint's record of its training.
        now: the fingerprint of the rows to compare with it.
        names: the names of the datasets in `now`, in their order.
    """
    saved = [item["name"] for item in record.get("facts", {}).get("data", ())]
    before, after = _by_dataset(record["data"], saved), _by_dataset(now, names)
    same = [one for one, other in zip(before, after, strict=False) if before[one] == after[other]]
    renamed = {other for one, other in zip(before, after, strict=False) if one in same}
    phrases = [
        f"{name} is not among the datasets (it had {_all_rows(rows)})"
        for name, rows in before.items()
        if name not in after and name not in same
    ]
    phrases += [
        f"{name} is a new dataset ({_all_rows(rows)})"
        for name, rows in after.items()
        if name not in before and name not in renamed
    ]
    for name in before.keys() & after.keys():
        phrases += [_changed_rows(name, item) for item in differences(before[name], after[name])]
    others = [str(item) for item in differences(record["data"], now)]
    if others and not phrases:
        wanted, given = list(before), list(after)
        is_order = wanted != given and set(wanted) == set(given)
        return [f"the datasets are {', '.join(given)}, were in the order {', '.join(wanted)}"] if is_order else others
    return sorted(phrases)


def _by_dataset(fingerprint: Mapping[str, str], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The entries of a fingerprint for each dataset, such as {"low": {"training rows": "54 rows, HASH"}}."""
    found: dict[str, dict[str, str]] = {}
    for key, value in fingerprint.items():
        place, sign, what = key.partition(": ")
        if sign:
            name = names[int(place)] if int(place) < len(names) else f"dataset {int(place) + 1}"
            found.setdefault(name, {})[what] = value
    return found


def _all_rows(rows: Mapping[str, str]) -> str:
    return " and ".join(f"{value.partition(' ')[0]} {what}" for what, value in rows.items())


def _changed_rows(name: str, item: Difference) -> str:
    """A phrase for rows of a dataset whose number, or else whose content, is another one."""
    now, before = (str(value).partition(" ")[0] for value in (item.now, item.before))
    return f"{name} has {now} {item.name}, " + (f"had {before}" if now != before else "as before, but with other texts")


def trainable_set(model: DyLoRAMoE) -> dict[str, Any]:
    """The parameters that an optimizer has: "text" for people, and "sha256" of all names and shapes in their order.

    A checkpoint holds both, and both are compared, so the text must stay as it is.
    """
    counts = {
        expert.name: sum(p.numel() for p in model.experts.parameters(expert.name) if p.requires_grad)
        for expert in model.experts.everyone
    }
    counts["the router"] = sum(p.numel() for p in model.router.parameters() if p.requires_grad)
    lines = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters() if p.requires_grad]
    text = ", ".join(f"{count:,} numbers of {name}" for name, count in counts.items())
    return {"text": text, "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def check_same_data(resumed: Resumption | None, data: LoadedData) -> None:
    """Raises ValueError, with each difference, unless the rows are those that the checkpoint was trained on."""
    if resumed is None or resumed.checkpoint is None:
        return
    changed = data_changes(resumed.record, data.fingerprint, data.names)
    if changed:
        raise ValueError(f"cannot resume from {resumed.checkpoint} with other data: {'; '.join(changed)}")
