"""The state of a stream: what its stages decided and measured, kept in the checkpoint of each stage."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dylo_moe.evaluation.loss_matrix import MATRIX, Matrix, Stage, write_matrix
from dylo_moe.model.checkpoint import CheckpointError, read_manifest
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.model.saving import save_checkpoint
from dylo_moe.training.run_folder import STREAM_FILE, checkpoints_in, clear_unfinished, discard
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.file_names import RESULT
from dylo_moe.utils.typed_json import read_json

STAGES = "stages"

FINISHED = "finished"
"""The state in stream.json of a stream that has learned all of its stages."""


@dataclass
class StreamState:
    """What a stream has done. It is resumed from the newest stage that has a checkpoint."""

    matrix: Matrix
    trained: dict[str, dict[str, int]] = field(default_factory=dict)
    """The number of rows that each expert was trained on, for each dataset."""
    processes: int = 1
    """The number of processes that share the rows of a step as config.yaml says."""

    @property
    def num_done(self) -> int:
        """The number of stages that are done."""
        return len(self.matrix.stages)

    def owner(self, dataset: str) -> str | None:
        """The expert that was trained on most rows of a dataset; None where no expert was."""
        counts = self.trained.get(dataset, {})
        return max(counts, key=counts.__getitem__) if counts else None

    def note_training(self, dataset: str, expert: str, num_rows: int) -> None:
        """Record that an expert was trained on rows of a dataset."""
        counts = self.trained.setdefault(dataset, {})
        counts[expert] = counts.get(expert, 0) + num_rows

    def record(self) -> dict[str, Any]:
        """Write the state as JSON values for a checkpoint's manifest."""
        return {"matrix": asdict(self.matrix), "trained": self.trained}

    @classmethod
    def restored(cls, record: dict[str, Any]) -> StreamState:
        """Restore the state from a checkpoint's manifest."""
        matrix = record["matrix"]
        stages = [Stage(**stage) for stage in matrix["stages"]]
        return cls(Matrix(**{**matrix, "stages": stages}), record["trained"])


def stage_folder(run: Path, place: int, name: str) -> Path:
    """The folder of a stage, `stages/01_NAME`."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)[:64]
    return run / STAGES / f"{place + 1:02d}_{plain}"


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the newest stage that is done; None where none is."""
    final = run / RESULT
    if final.is_dir():
        return final
    found = [stage for stage in stage_folders(run) if (stage / RESULT).is_dir()]
    return found[-1] / RESULT if found else None


def stage_folders(run: Path) -> list[Path]:
    """The folders of the stages so far, in the order of their numbers."""
    found = (run / STAGES).iterdir() if (run / STAGES).is_dir() else ()
    numbered = [(path.name.partition("_")[0], path) for path in found]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdecimal())]


def read_state(checkpoint: Path) -> tuple[StreamState, dict[str, Any]]:
    """Read the state in a stage's checkpoint, and the whole record of its training.

    Raises:
        CheckpointError: for a checkpoint that is incomplete or altered.
        ValueError: for a checkpoint that is not of a stream.
    """
    record = read_manifest(checkpoint).get("training") or {}
    if "stream" not in record:
        raise ValueError(f"{checkpoint} is not a checkpoint of a stream")
    try:
        return StreamState.restored(record["stream"]), record
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} has no state of a stream that can be read: {error!r}") from error


def save_stage(
    model: DyLoRAMoE, run: Path, folder: Path, state: StreamState, record: dict[str, Any], *, keep: bool
) -> None:
    """Save the checkpoint of a stage, by which the stage is done, and delete the checkpoint of the stage before.

    The files for people are written after the checkpoint, because a stream is resumed from the checkpoint alone. Of
    several processes one does it all.

    Args:
        folder: the folder of the stage.
        record: the part of the manifest's record that is the same for all stages.
        keep: whether the checkpoints of earlier stages are kept.
    """
    older = last_checkpoint(run)
    losses = {"before": state.matrix.base, "after": state.matrix.stages[-1].losses}
    training = {**record, "stream": state.record(), "step": state.num_done}
    save_checkpoint(model, folder / RESULT, training=training, losses=losses)
    write_view(run, state, is_over=False)
    if older is not None and not keep:
        discard(older)
    for _, spare in checkpoints_in(folder):
        discard(spare)


def finish_stream(run: Path, state: StreamState) -> Path:
    """Make the last stage's checkpoint that of the stream; returns its folder."""
    final, last = run / RESULT, last_checkpoint(run)
    if last is not None and last != final:
        os.rename(last, final)
    write_view(run, state, is_over=True)
    return final


def is_finished(run: Path) -> bool:
    """Whether a stream has its final checkpoint, and the files that are written after it.

    Raises:
        CheckpointError: for a final checkpoint that is incomplete or altered.
    """
    try:
        view = read_json(run / STREAM_FILE)
    except ValueError:  # resuming writes it again
        return False
    if not (run / RESULT).is_dir() or not isinstance(view, dict) or view.get("state") != FINISHED:
        return False
    read_state(run / RESULT)
    return True


def write_view(run: Path, state: StreamState, *, is_over: bool) -> None:
    """Write stream.json and matrix.json, for people and their tools; a stream is not resumed from them, but only
    called finished."""
    write_matrix(run / MATRIX, state.matrix)
    stages = [
        {
            "name": stage.name,
            "folder": stage_folder(Path("."), place, stage.name).as_posix(),
            "decision": stage.decision,
        }
        for place, stage in enumerate(state.matrix.stages)
    ]
    write_json(
        run / STREAM_FILE,
        {
            "version": 1,
            "state": FINISHED if is_over else "running",
            "processes": state.processes,
            "skills": state.matrix.skills,
            "stages": stages,
        },
    )


def clear_leftovers(run: Path, *, keep: bool) -> list[str]:
    """Delete what a kill has left in the stages' folders: unfinished saves, and checkpoints that a later one replaces.

    Args:
        keep: whether the checkpoints of earlier stages are kept.

    Returns:
        The names of the unfinished saves.
    """
    stages = stage_folders(run)
    names = [name for folder in (run, *stages) for name in clear_unfinished(folder)]
    last = last_checkpoint(run)
    num_done = len(stages) if last == run / RESULT else 0 if last is None else stages.index(last.parent) + 1
    for stage in stages[:num_done]:  # the stage that is under way goes on from its own
        for _, spare in checkpoints_in(stage):
            discard(spare)
        if (stage / RESULT).is_dir() and stage / RESULT != last and not keep:
            discard(stage / RESULT)
    return names
