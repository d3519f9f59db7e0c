"""Whether a manifest is as it was written, and whether each of its fields has its type and range."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from peft import LoraConfig

from dylo_moe.base.fingerprint import unpack_samples
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.experts.expert import Expert, check_name
from dylo_moe.model.manifest import CHECKSUM, expert_entries
from dylo_moe.routing.config import BASE, SHARED, RouterConfig
from dylo_moe.utils.checks import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SHARE_BELOW_ONE, range_problems
from dylo_moe.utils.errors import DyLoRAWarning
from dylo_moe.utils.typed_json import checksum, field_problems, shown, type_problems

SHA256 = re.compile(r"[0-9a-f]{64}")

EXPERT_FIELDS = [item.name for item in fields(Expert)]

LORA_RANGES = {"r": COUNT, "lora_alpha": POSITIVE, "lora_dropout": SHARE_BELOW_ONE}


@dataclass
class BaseEntry:
    """The types of the entry `base`."""

    id: str
    revision: str | None
    fingerprint: Fingerprint
    quantization: dict[str, Any] | None = None


@dataclass
class Fingerprint:
    """The types of a base's fingerprint."""

    quantized: bool
    dtype: str
    tensors: dict[str, list[int]]
    samples: str


@dataclass
class SkillEntry:
    """The types of what a skill library's record says of one skill."""

    name: str
    expert: str
    num_texts: int
    num_tokens: int
    shares: dict[str, float]


@dataclass
class LibraryRecord:
    """The types of a skill library's record."""

    hidden_size: int
    num_pooled: int
    skills: list[SkillEntry]


@dataclass
class GrowthEntry:
    """The types of the entry `growth`."""

    allow_expert_growth: bool
    config: GrowthConfig
    members: list[str]
    skills: LibraryRecord


@dataclass
class FileEntry:
    """The types of what is known of one file."""

    sha256: str
    bytes: int


@dataclass
class TrainingRecord:
    """The types of those entries of a training's record that are read again; it may have others."""

    settings: dict[str, Any] | None = None
    data: dict[str, str] | None = None
    facts: dict[str, Any] | None = None
    step: int | None = None
    epoch: float | None = None
    world_size: int | None = None
    num_tokens: int | None = None
    trainable: dict[str, str] | None = None
    losses_before: dict[str, Any] | None = None
    losses_after: dict[str, Any] | None = None
    stream: dict[str, Any] | None = None


@dataclass
class Manifest:
    """The types of a whole manifest."""

    format_version: int
    base: BaseEntry
    router: dict[str, Any]
    balance_coefficient: float
    lora: dict[str, Any]
    experts: list[Expert]
    files: dict[str, FileEntry]
    growth: GrowthEntry | None = None
    shared: Expert | None = None
    training: dict[str, Any] | None = None
    checksum: str | None = None


def manifest_problems(manifest: Any) -> list[str]:
    """Everything that is wrong with a manifest's fields, in words; first with their types, then with their ranges."""
    problems = field_problems(Manifest, manifest, "it")
    if problems or any(manifest.get(name, "") is None for name in ("training", "shared", CHECKSUM)):
        return problems or ["training, shared and checksum may be left out, but not be null"]
    for place, entry in enumerate(expert_entries(manifest)):
        problems += [f"expert {place} lacks {name}" for name in EXPERT_FIELDS if name not in entry]
    problems += field_problems(RouterConfig, manifest["router"], "router")
    problems += lora_problems(manifest["lora"], "lora")
    if "training" in manifest:
        problems += training_problems(manifest["training"])
    return problems or _range_problems(manifest)


def _range_problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the values of a manifest whose types are right."""
    problems = range_problems(manifest, {"balance_coefficient": NOT_NEGATIVE})
    for entry in expert_entries(manifest):
        ranges = {"rank": COUNT, "parameters": COUNT}
        problems += [f"expert {entry['name']}: {problem}" for problem in range_problems(entry, ranges)]
    names = [entry["name"] for entry in manifest["experts"]]
    if not names:
        problems.append("its experts are none; a pool has at least one")
    problems += [problem for index, name in enumerate(names) if (problem := _name_problem(name, names[:index]))]
    if "shared" in manifest and manifest["shared"]["name"] != SHARED:
        problems.append(f"its shared expert is named {manifest['shared']['name']!r}, which must be {SHARED!r}")
    for name, entry in manifest["files"].items():
        if not SHA256.fullmatch(entry["sha256"]) or entry["bytes"] < 0:
            problems.append(f"files: the hash or the size of {shown(name)} is none: {shown(entry)}")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not name:
            problems.append(f"files: {shown(name)} is outside of the folder")
    if manifest.get("growth") is not None:
        problems += _growth_problems(manifest["growth"], names)
    if any(size < 0 for shape in manifest["base"]["fingerprint"]["tensors"].values() for size in shape):
        problems.append("base.fingerprint.tensors has a shape with a negative size")
    for check in (
        lambda: RouterConfig(**manifest["router"]),
        lambda: unpack_samples(manifest["base"]["fingerprint"]),
    ):
        try:
            check()
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    return problems


def _name_problem(name: str, before: list[str]) -> str | None:
    try:
        check_name(name, taken=before)
    except ValueError as error:
        return str(error)
    return None


def _growth_problems(growth: dict[str, Any], names: list[str]) -> list[str]:
    members, library = growth["members"], growth["skills"]
    problems = []
    if sorted({*members} - {BASE}) != sorted(names) or len({*members}) != len(members):
        problems.append(f"its members are {shown(members)}, which are not its experts")
    problems += range_problems(library, {"hidden_size": COUNT, "num_pooled": COUNT_OR_NONE})
    for skill in library["skills"]:
        found = range_problems(skill, {"num_texts": COUNT_OR_NONE, "num_tokens": COUNT_OR_NONE})
        if skill["expert"] not in members:
            found.append(f"expert is {shown(skill['expert'])}, which is no member")
        problems += [f"skill {shown(skill['name'])}: {problem}" for problem in found]
    try:
        GrowthConfig(**growth["config"])
    except ValueError as error:
        problems.append(str(error))
    return problems


def training_problems(record: Any) -> list[str]:
    """What is wrong with the types and ranges of a training's record."""
    problems = field_problems(TrainingRecord, record, "training", is_open=True)
    if problems:
        return problems
    kinds = type_problems((record.get("facts") or {}).get("data", []), list[dict[str, Any]], "training.facts.data")
    if kinds or any(not isinstance(item.get("name"), str) for item in (record.get("facts") or {}).get("data", [])):
        return kinds or ["training.facts.data has an entry without a name"]
    counts = dict.fromkeys(("step", "num_tokens"), COUNT_OR_NONE) | {"world_size": COUNT, "epoch": NOT_NEGATIVE}
    return [f"training: {problem}" for problem in range_problems(record, counts)]


def lora_problems(values: Any, where: str) -> list[str]:
    """What is wrong with a LoRA config as JSON has it: types, ranges, and fields that this PEFT does not know."""
    if not isinstance(values, dict):
        return [f"{where} is {shown(values)}; it must be an object"]
    rounded = dict(values)
    alpha = values.get("lora_alpha")
    if isinstance(alpha, float) and not type_problems(alpha, float, where):
        rounded["lora_alpha"] = 1  # PEFT says int, and computes with any number
    problems = field_problems(LoraConfig, rounded, where)
    problems += [] if problems else [f"{where}: {problem}" for problem in range_problems(values, LORA_RANGES)]
    for pattern in ("rank_pattern", "alpha_pattern"):
        kind = dict[str, int] if pattern == "rank_pattern" else dict[str, float]
        found = type_problems(values.get(pattern) or {}, kind, f"{where}.{pattern}")
        allowed = COUNT if pattern == "rank_pattern" else POSITIVE
        found = found or range_problems(values.get(pattern) or {}, dict.fromkeys(values.get(pattern) or {}, allowed))
        problems += found
    return problems


def checksum_problem(manifest: dict[str, Any], path: Path) -> str | None:
    """What is wrong with a manifest's checksum; one that older versions wrote has none, which is warned of."""
    if CHECKSUM not in manifest:
        text = f"{path} was written by an older version and has no checksum of its own; saving again adds one"
        warnings.warn(text, DyLoRAWarning, stacklevel=3)
        return None
    found = checksum(manifest, leave_out=CHECKSUM)
    return None if found == manifest[CHECKSUM] else "it was altered: its checksum is not that of its content"
