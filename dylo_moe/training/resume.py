"""Where a run goes on: its checkpoints, and whether what is asked for now is what they were made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dylo_moe.data.loading import LoadedData
from dylo_moe.model.checkpoint import CheckpointError, read_manifest
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.training.run_folder import CONFIG_FILE, NUMBERED, checkpoints_in

LATEST = "latest"

AUTO = "auto"

LOCATIONS = ("model", "datasets", "data_dir", "columns", "preprocessing_num_workers")
"""Settings that say where things lie; the base and the rows themselves are compared instead."""

MAY_CHANGE = (  # noqa: SIM905
    "output_dir num_train_epochs max_steps per_device_eval_batch_size load_best_model_at_end metric_for_best_model "
    "greater_is_better early_stopping_patience early_stopping_threshold report_to run_name project use_cpu tf32 "
    "attn_implementation loss_chunk_size gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
    "activation_checkpointing_kwargs eval_benchmark eval_benchmark_steps allow_code_execution sandbox"
).split()
"""Settings that may be others when a run goes on. More epochs or steps stretch what is left of the learning rate's
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

ROWS, TURNS = "per_device_train_batch_size", "gradient_accumulation_steps"
"""With the number of processes, the rows of an optimizer step: none of the three matters but their product."""


class Resumption(NamedTuple):
    """What a run goes on from."""

    run: Path
    """The run's folder."""
    checkpoint: Path | None
    """None: the run was interrupted before its first checkpoint, so it starts at its beginning."""
    settings: dict[str, Any]
    """Its settings, as a recipe."""
    record: dict[str, Any]
    """The manifest's record of the training; empty without a checkpoint."""
    broken: tuple[str, ...] = ()
    """Newer checkpoints that are not whole, each with what is wrong; only "auto" passes them over."""


def find(wanted: str, output_dir: str | None) -> Resumption | None:
    """What `--resume_from_checkpoint` means.

    Args:
        wanted: "latest", "auto", a run's folder or a checkpoint's. "auto" goes back to the newest that is whole.
        output_dir: as typed; needed for the first two, which look there.

    Returns:
        None where "auto" finds no run, and one is to start.

    Raises:
        CheckpointError: where there is nothing to go on from, or it is not whole.
    """
    if wanted in (LATEST, AUTO, "True", "true"):
        if output_dir is None:
            raise CheckpointError(f"--resume_from_checkpoint {wanted} needs --output_dir, the folder of the run")
        run = Path(output_dir)
        if not (run / CONFIG_FILE).is_file():
            if wanted == AUTO and not (run.exists() and any(run.iterdir())):
                return None
            raise CheckpointError(f"there is no run in {run} to go on with; look at --output_dir, or start a new run")
    else:
        run = Path(wanted)
        if not run.is_dir():
            raise CheckpointError(f"there is no checkpoint and no run {run}")
        if (run / "dylora.json").is_file() or NUMBERED.fullmatch(run.name):
            return _from_checkpoint(run)
        if not (run / CONFIG_FILE).is_file():
            raise CheckpointError(f"{run} is neither a checkpoint (no dylora.json) nor a run (no {CONFIG_FILE})")
    broken: list[str] = []
    for _, checkpoint in reversed(checkpoints_in(run)):
        try:
            return _from_checkpoint(checkpoint)._replace(broken=tuple(broken))
        except CheckpointError as error:
            if wanted != AUTO:  # nobody is there to be asked
                raise
            broken.append(str(error))
    settings = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    return Resumption(run, None, settings, {}, tuple(broken))


def _from_checkpoint(folder: Path) -> Resumption:
    record = read_manifest(folder).get("training")
    if not record or "settings" not in record or not (folder / "trainer_state.json").is_file():
        raise CheckpointError(
            f"{folder} holds experts and router only, and nothing to go on training from (no optimizer, no settings); "
            "give a folder named checkpoint-STEP"
        )
    return Resumption(folder.parent, folder, record["settings"], record)


def shared_out(resumed: Resumption, num_processes: int) -> dict[str, Any]:
    """The settings of a checkpoint for another number of processes, which share the rows of a step among them.

    Each takes as many at once as before, or, where that does not come out even, the next smaller number that does.

    Raises:
        CheckpointError: where no number does.
    """
    settings, before = resumed.settings, resumed.record.get("world_size", 1)
    if num_processes == before or ROWS not in settings:
        return settings
    at_once, turns = settings[ROWS], settings.get(TURNS, 1)
    total = at_once * turns * before
    if total % num_processes:
        fitting = [str(number) for number in range(1, total + 1) if total % number == 0]
        raise CheckpointError(
            f"{resumed.checkpoint} was trained with {total} rows a step, which {num_processes} processes cannot share "
            f"evenly; go on with {', '.join(fitting[:8])}{' or more' if len(fitting) > 8 else ''}"
        )
    each = total // num_processes
    at_once = next(number for number in range(min(at_once, each), 0, -1) if each % number == 0)
    return {**settings, ROWS: at_once, TURNS: each // at_once}


def changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, processes: tuple[int, int] = (1, 1)
) -> tuple[list[str], list[str]]:
    """Settings that differ: those that may not, and those that may, in words.

    Args:
        processes: how many there were, and are.
    """
    rows = [settings.get(ROWS, 1) * settings.get(TURNS, 1) for settings in (saved, now)]
    is_same_step = rows[0] * processes[0] == rows[1] * processes[1]
    refused: list[str] = []
    allowed: list[str] = []
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) == now.get(name) or name in LOCATIONS:
            continue
        free = name in MAY_CHANGE or name.startswith(MAY_CHANGE_PREFIXES) or (name in (ROWS, TURNS) and is_same_step)
        (allowed if free else refused).append(f"{name} is {now.get(name)!r}, was {saved.get(name)!r}")
    return refused, allowed


def data_changes(saved: Mapping[str, str], now: Mapping[str, str], names: list[str]) -> list[str]:
    """How the rows differ from those of the checkpoint, in words."""

    def title(key: str) -> str:
        place, _, what = key.partition(": ")
        return f"{names[int(place)]}: {what}" if what and int(place) < len(names) else key

    return [
        f"{title(key)} are {now.get(key, 'none')}, were {saved.get(key, 'none')}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]


def trainable_set(model: DyLoRAMoE) -> dict[str, Any]:
    """What an optimizer's state is of: "text" for people, "sha256" of all names and shapes in their order."""
    counts = {
        expert.name: sum(p.numel() for p in model.experts.parameters(expert.name) if p.requires_grad)
        for expert in model.experts
    }
    counts["the router"] = sum(p.numel() for p in model.router.parameters() if p.requires_grad)
    lines = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters() if p.requires_grad]
    text = ", ".join(f"{count:,} numbers of {name}" for name, count in counts.items())
    return {"text": text, "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


# Where it begins.


def check_same_data(resumed: Resumption | None, data: LoadedData) -> None:
    """Raises ValueError, with each difference, unless the rows are those that the checkpoint was trained on."""
    if resumed is None or resumed.checkpoint is None:
        return
    differences = data_changes(resumed.record["data"], data.fingerprint, data.names)
    if differences:
        raise ValueError(f"cannot go on from {resumed.checkpoint} with other data: {'; '.join(differences)}")
