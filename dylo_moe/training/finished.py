"""A run that has ended: what is left to train of it, and its result, which a longer training does not overwrite.

The result is the folder `checkpoint` in the run's folder. It is complete once its record holds the losses after
training; before that a run was killed while it was evaluated at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dylo_moe.model.checkpoint import CheckpointError, read_manifest
from dylo_moe.model.manifest import expert_entries
from dylo_moe.training.resume import Resumption, changes
from dylo_moe.training.run_folder import checkpoints_in, fresh_folder
from dylo_moe.utils.file_names import MANIFEST, RESULT

LOSSES_AFTER = "losses_after"
"""The entry of the result's record that is written last: each dataset's held-out loss after training."""

WHEN_IT_ENDS = ("num_train_epochs", "max_steps", "early_stopping_patience", "early_stopping_threshold")

WHICH_IS_KEPT = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
"""Settings that may change when a run is resumed, and that decide which of its steps the result is of."""


def result_record(run: Path) -> dict[str, Any] | None:
    """The training's record in the result of a run; None where the run has none yet, or one that is not complete."""
    if not (run / RESULT / MANIFEST).is_file():
        return None
    record = read_manifest(run / RESULT).get("training") or {}
    return record if LOSSES_AFTER in record else None


def nothing_left(resumed: Resumption | None, output_dir: str, settings: Mapping[str, Any]) -> str | None:
    """Say that the run to resume is finished, where its result is complete and no step is left.

    Args:
        output_dir: the folder of the run that is to be written; another one than the resumed run's is a branch.
        settings: the settings of now.

    Returns:
        None where something is left to train or to evaluate, or an older checkpoint than the newest is named.

    Raises:
        CheckpointError: where more training is asked of a finished run that has no numbered checkpoint.
    """
    if resumed is None or Path(output_dir).resolve() != resumed.run.resolve():
        return None
    record, numbered = result_record(resumed.run), [path for _, path in checkpoints_in(resumed.run)]
    newest = numbered[-1].resolve() if numbered else None
    if record is None or (resumed.checkpoint is not None and resumed.checkpoint.resolve() != newest):
        return None
    changed = {name for name in (*WHEN_IT_ENDS, *WHICH_IS_KEPT) if settings.get(name) != record["settings"].get(name)}
    is_over, end = _is_over(record, settings, changed), f"at step {record['step']}, epoch {record['epoch']:g}"
    result = resumed.run / RESULT
    if resumed.checkpoint is None:
        refused, _ = changes(record["settings"], settings)
        if refused or not is_over:
            others = f", and other settings are given: {'; '.join(refused)}" if refused else ""
            raise CheckpointError(
                f"the run in {resumed.run} is finished, {end}, and has no checkpoint-STEP to go on from{others}. Its "
                f"result is {result}; to train anew leave --resume_from_checkpoint out and give a new --output_dir"
            )
        return f"{resumed.run} is finished, {end}: nothing is left to train, and nothing was written."
    if not is_over:
        return None
    more = "--max_steps" if settings.get("max_steps", -1) > 0 else "--num_train_epochs"
    return (
        f"{resumed.run} is finished, {end}: nothing is left to train, and nothing was written. A larger {more} trains "
        "it further."
    )


def _is_over(record: Mapping[str, Any], settings: Mapping[str, Any], changed: set[str]) -> bool:
    """Whether a finished run has no step left under the settings of now, and its result stays the same."""
    if not changed:
        return True
    if not changed.isdisjoint(WHICH_IS_KEPT):
        return False
    most = settings.get("max_steps", -1)
    return record["step"] >= most if most > 0 else record["epoch"] >= settings["num_train_epochs"]


def keep_earlier_result(run: Path, step: int) -> dict[str, str]:
    """Rename the result of a run, where it has one, before that of step `step` is written in its place.

    A result of the same step that is not complete is left where it is, and will be replaced.

    Returns:
        The names under which a result and its experts may have been evaluated, each with the new one.
    """
    result = run / RESULT
    if not (result / MANIFEST).is_file():
        return {}
    manifest = read_manifest(result)
    record = manifest.get("training") or {}
    if record.get("step") == step and LOSSES_AFTER not in record:
        return {}
    kept = fresh_folder(run, f"{RESULT}-of-step-{record.get('step')}").name
    result.rename(run / kept)
    return {RESULT: kept} | {f"{RESULT}-{item['name']}": f"{kept}-{item['name']}" for item in expert_entries(manifest)}
