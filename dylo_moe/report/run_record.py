"""Read what the folder of a run holds, even if the run was killed or is still running."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dylo_moe.routing.config import RESPONSE
from dylo_moe.utils.file_names import MANIFEST
from dylo_moe.utils.words import counted

FILES = ("config.yaml", "metrics.jsonl", "run.json")
"""The files of a run; a folder that holds none of them is not a run's."""

Points = list[tuple[float, float | None]]
"""The (step, value) of each logged line; the value is None if it is not finite."""


class Record(NamedTuple):
    """A run as its files describe it; what they do not hold is empty."""

    name: str
    """The name of the run's folder."""
    facts: dict[str, Any]
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    samples: list[dict[str, Any]]
    domains: list[str]
    """The datasets, by their names in the metrics."""
    experts: list[str]
    is_finished: bool
    missing: list[str]
    """Sentences about files that are not there or cannot be read."""

    @property
    def by_answers(self) -> bool:
        """Whether only answers are routed, and counted, while the base reads all other tokens."""
        return self.settings.get("granularity") == RESPONSE

    @property
    def has_training_log(self) -> bool:
        """Whether a training loss was logged, not only evaluations."""
        return any("lm_loss" in line for line in self.lines)

    def points(self, key: str) -> Points:
        """The (step, value) of each line that has this key; the value is None if it is not a finite number."""
        return [(line["step"], finite(line[key])) for line in self.lines if key in line]

    def last(self, key: str) -> float | None:
        """The value of the last line that has this key."""
        points = self.points(key)
        return points[-1][1] if points else None

    @property
    def losses(self) -> dict[str, Points]:
        """Held-out losses of each dataset, in the order of the evaluations."""
        return {domain: self.points(f"eval_{domain}_loss") for domain in self.domains}

    @property
    def benchmarks(self) -> list[str]:
        """The code benchmarks that were run during training."""
        return _named(self.lines, r"eval_(.+)_pass_at_1")

    @property
    def alarms(self) -> list[tuple[int, str]]:
        """The alarms as (step, sentence)."""
        return [(line["step"], str(text)) for line in self.lines for text in _list(line.get("alarms"))]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return any((folder / name).is_file() for name in FILES)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is that of a checkpoint."""
    return (folder / MANIFEST).is_file()


def read_checkpoint(folder: Path) -> Record:
    """Read what a checkpoint without its run knows about the run: what it was made of, and the losses before it.

    The hashes of its files are not checked.
    """
    missing = ["this is a checkpoint without the folder of its run: what was logged in training is not known"]
    training = read_mapping(folder / MANIFEST, missing, "nothing is known").get("training")
    training = training if isinstance(training, dict) else {}
    before, facts, settings = ({**_dict(training.get(name))} for name in ("losses_before", "facts", "settings"))
    lines = [{"step": 0, **{f"eval_{name}_loss": loss for name, loss in before.items()}}] if before else []
    step = finite(training.get("step"))
    if step is not None:
        lines.append({"step": int(step), "epoch": training.get("epoch")})
    domains, experts = _names(facts, "data") or list(before), _names(facts, "experts")
    return Record(folder.resolve().name, facts, settings, lines, [], domains, experts, False, missing)


def read_record(folder: Path) -> Record:
    """Read the files of a run that are there; `missing` tells about the others."""
    missing: list[str] = []
    facts = read_mapping(folder / "run.json", missing, "base, experts, data, versions and hardware are not known")
    settings = read_mapping(folder / "config.yaml", missing, "the configuration is not known")
    lines = _read_lines(folder / "metrics.jsonl", missing)
    is_finished = (folder / "samples.json").is_file()
    samples: list[dict[str, Any]] = []
    if is_finished:
        samples = _dicts(_read(folder / "samples.json", missing, "there are no samples"))
    else:
        missing.append("samples.json is missing: the run has not ended, or did not end well")
    domains = _names(facts, "data") or _named(lines, r"eval_(.+)_loss")
    experts = _names(facts, "experts") or _named(lines, r"gate_drift_(.+)")
    record = Record(folder.resolve().name, facts, settings, lines, samples, domains, experts, is_finished, missing)
    if lines and not record.has_training_log:
        missing.append("metrics.jsonl holds no training log yet")
    return record


def finite(value: Any) -> float | None:
    """The value as a float if it is a finite number; else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def read_mapping(path: Path, missing: list[str], consequence: str) -> dict[str, Any]:
    """Read a mapping from a JSON or YAML file; empty if that is not possible.

    Args:
        missing: a sentence is appended if the file is missing, cannot be read, or holds something else.
        consequence: the end of that sentence.
    """
    found = _read(path, missing, consequence)
    if isinstance(found, dict):
        return {str(name): value for name, value in found.items()}
    if found is not None:
        missing.append(f"{path.name} holds no settings: {consequence}")
    return {}


def _read(path: Path, missing: list[str], consequence: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        missing.append(f"{path.name} is missing: {consequence}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        missing.append(f"{path.name} cannot be read ({type(error).__name__}): {consequence}")
    return None


def _read_lines(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        missing.append("metrics.jsonl is missing: nothing was logged")
        return []
    lines, broken = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            broken += 1
    if broken:
        verb = "is" if broken == 1 else "are"
        missing.append(f"{counted(broken, 'line')} of metrics.jsonl {verb} cut off or not JSON, and left out")
    if not lines:
        missing.append("metrics.jsonl is empty: nothing was logged")
    return lines


def _named(lines: list[dict[str, Any]], pattern: str) -> list[str]:
    """The names in the keys of the metrics, for a run whose run.json does not hold them."""
    found = [match[1] for line in lines for key in line if (match := re.fullmatch(pattern, key))]
    return list(dict.fromkeys(found))


def _names(facts: dict[str, Any], key: str) -> list[str]:
    """The names of the datasets or experts in the facts of a run."""
    return [str(item["name"]) for item in _dicts(facts.get(key)) if "name" in item]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in _list(value) if isinstance(item, dict)]
