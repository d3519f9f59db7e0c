"""What the folder of a run tells afterwards, whole or not."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FILES = ("config.yaml", "metrics.jsonl", "run.json")
"""A folder that holds none of these is no run."""

Points = list[tuple[float, float | None]]


class Record(NamedTuple):
    """A run as its files tell it; what they do not tell is empty."""

    name: str
    """Of the folder."""
    facts: dict[str, Any]
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""
    samples: list[dict[str, Any]]
    domains: list[str]
    """The datasets, as the metrics call them."""
    experts: list[str]
    is_finished: bool
    missing: list[str]
    """What is not there, or cannot be read, in sentences."""

    def points(self, key: str) -> Points:
        """(step, value) of each line that has this key; None where its value is not a finite number."""
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
        """The code benchmarks that were run while it trained."""
        return _named(self.lines, r"eval_(.+)_pass_at_1")

    @property
    def alarms(self) -> list[tuple[int, str]]:
        """(step, sentence)."""
        return [(line["step"], str(text)) for line in self.lines for text in _list(line.get("alarms"))]


def read_record(folder: Path) -> Record:
    """Read what there is.

    Raises:
        ValueError: for a folder that is no run's.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}")
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"{folder} is no run: it holds none of {', '.join(FILES)}")
    missing: list[str] = []
    facts = _mapping(_read(folder / "run.json", missing, "base, experts, data, versions and hardware are not known"))
    settings = _mapping(_read(folder / "config.yaml", missing, "the configuration is not known"))
    lines = _read_lines(folder / "metrics.jsonl", missing)
    is_finished = (folder / "samples.json").is_file()
    samples: list[dict[str, Any]] = []
    if is_finished:
        found = _list(_read(folder / "samples.json", missing, "there are no samples"))
        samples = [item for item in found if isinstance(item, dict)]
    else:
        missing.append("samples.json is missing: the run has not ended, or did not end well")
    if lines and not any("lm_loss" in line for line in lines):
        missing.append("metrics.jsonl holds no training log yet")
    domains = [str(item["name"]) for item in _dicts(facts.get("data")) if "name" in item]
    experts = [str(item["name"]) for item in _dicts(facts.get("experts")) if "name" in item]
    domains = domains or _named(lines, r"eval_(.+)_loss")
    experts = experts or _named(lines, r"gate_drift_(.+)")
    return Record(folder.resolve().name, facts, settings, lines, samples, domains, experts, is_finished, missing)


def finite(value: Any) -> float | None:
    """A number, or None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _read(path: Path, missing: list[str], so: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        missing.append(f"{path.name} is missing: {so}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        missing.append(f"{path.name} cannot be read ({type(error).__name__}): {so}")
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
        count = "1 line of metrics.jsonl is" if broken == 1 else f"{broken:,} lines of metrics.jsonl are"
        missing.append(f"{count} cut off or no JSON, and left out")
    if not lines:
        missing.append("metrics.jsonl is empty: nothing was logged")
    return lines


def _named(lines: list[dict[str, Any]], pattern: str) -> list[str]:
    """Names as the metrics' keys hold them, where run.json does not say them."""
    found = [match[1] for line in lines for key in line if (match := re.fullmatch(pattern, key))]
    return list(dict.fromkeys(found))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in _list(value) if isinstance(item, dict)]
