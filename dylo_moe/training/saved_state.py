"""The Trainer's state and a run's settings, as files hold them: read without a traceback, whatever is in them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerState

from dylo_moe.model.checkpoint import CheckpointError
from dylo_moe.utils.checks import COUNT_OR_NONE, NOT_NEGATIVE, range_problems
from dylo_moe.utils.typed_json import field_problems, read_json, shown

STATE_FILE = "trainer_state.json"

STATE_FIELDS = {item.name for item in fields(TrainerState)}


@dataclass
class StateTypes:
    """The types of the Trainer's state that are relied on. Losses may be NaN, so that they may be anything here."""

    global_step: int
    epoch: float | None = None
    max_steps: int = 0
    num_train_epochs: float = 0
    logging_steps: float = 0
    eval_steps: float = 0
    save_steps: float = 0
    train_batch_size: int | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] | None = None


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """The Trainer's state in a training checkpoint.

    Raises:
        CheckpointError: for a file that cannot be read, or with a field of another type or out of range.
    """
    path = checkpoint / STATE_FILE
    try:
        values = read_json(path)
        problems = field_problems(StateTypes, values, "it", is_open=True)
        if not problems:
            problems = [f"it has {shown(name)}, which is unknown here" for name in sorted(values.keys() - STATE_FIELDS)]
            steps = dict.fromkeys(("global_step", "best_global_step"), COUNT_OR_NONE)
            problems += range_problems(values, steps | {"epoch": NOT_NEGATIVE, "max_steps": COUNT_OR_NONE})
            lines = [line.get("step") for line in values.get("log_history", [])]
            problems += [f"log_history has step {shown(step)}" for step in lines if not COUNT_OR_NONE.holds(step)][:1]
        if problems:
            raise ValueError("; ".join(problems[:5]))
        return TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run, as a recipe.

    Raises:
        CheckpointError: for a file that cannot be read, or is no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"it holds {shown(values)}, and no settings")
        return values
    except RecursionError:
        raise CheckpointError(f"{path} cannot be used: it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be used: {said}") from error
