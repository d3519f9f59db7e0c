"""Recipes: YAML files of `flag: value` lines, and the command lines that mean the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from dylo_moe.parsing.command_line import SHOWN_FLAGS, Refusal
from dylo_moe.parsing.flags import as_typed, flags_of, values_of
from dylo_moe.parsing.parser import Parser, options, unknown
from dylo_moe.parsing.recipe_file import recipe_file
from dylo_moe.training.trainer_arguments import TrainArguments
from dylo_moe.utils.errors import UsageError

NOT_SETTINGS = ("output_dir", "resume_from_checkpoint", "wandb_checkpoint_artifact", "fsdp", "fsdp_config")
"""Flags that are not part of a run's settings: they say where it is written, what it resumes from, and how its
processes share the work, and do not change what is trained."""


def with_recipe(argv: Sequence[str], parser: Parser, refusal: Refusal) -> list[str]:
    """Replace --config in a command line, if it is there, by the recipe's words; typed flags come later, and so win.

    Raises:
        UsageError: for a recipe that cannot be read, or has a flag that the parser does not offer.
    """
    recipe, rest = _split(list(argv))
    return (_words_of_file(recipe_file(recipe), parser, refusal) if recipe else []) + rest


def last_value(words: list[str], flag: str) -> str | None:
    """The last value of a flag in a command line, as typed; None where the flag is not there."""
    value = None
    for place, word in enumerate(words):
        if word == flag and place + 1 < len(words):
            value = words[place + 1]
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
    return value


def _split(argv: list[str]) -> tuple[str | None, list[str]]:
    recipe, rest = None, []
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            if recipe is not None:
                raise UsageError("--config is given twice; a run has one recipe")
            recipe = word[len("--config=") :] if "=" in word else next(words, None)
            if not recipe:
                raise UsageError("--config needs the path of a YAML recipe, or the name of one that comes with dylora")
        else:
            rest.append(word)
    return recipe, rest


def _words_of_file(path: Path, parser: Parser, refusal: Refusal) -> list[str]:
    """Read a recipe into the command line that means the same."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path} must be `flag: value` lines; it is a {type(content).__name__}")
    for key in content:
        if f"--{key}" not in options(parser) or refusal(str(key)):
            raise UsageError(f"recipe {path}: " + unknown(f"--{key}", parser, refusal).replace("--", ""))
    return as_words(content)


def as_words(settings: dict[str, Any]) -> list[str]:
    """Write settings as the command line that means the same."""
    words: list[str] = []
    for key, value in settings.items():
        if value is None or value == []:
            continue
        words.append(f"--{key}")
        if isinstance(value, list):
            words += [str(item) for item in value]
        else:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def in_full(saved: dict[str, Any], kinds: tuple[type, ...]) -> dict[str, Any]:
    """Complete the settings of a run by the defaults of flags that the version which wrote them may not have had."""
    known = {flag: item for kind in kinds for flag, item in flags_of(kind).items()}
    defaults = {flag: item.default for flag, item in known.items() if item.default is not MISSING}
    return {
        name: as_typed(known[name], value) if name in known else value for name, value in (defaults | saved).items()
    }


def plain_settings(parts: Sequence[Any], train: TrainArguments, refusal: Refusal) -> dict[str, Any]:
    """Write flags as plain values: all of ours, and the Trainer's that --help shows or that differ from the default."""
    values: dict[str, Any] = {}
    for part in parts:
        for name, value in values_of(part).items():
            if value != [] and not refusal(name) and name not in NOT_SETTINGS:
                values[name] = value
    saved = train.to_dict()
    for item in fields(train):
        value = saved.get(item.name)
        if item.name in NOT_SETTINGS or not item.init or refusal(item.name) or value in (None, []):
            continue
        if item.name in SHOWN_FLAGS or value != getattr(TrainingArguments, item.name, None):
            values[item.name] = value
    return json.loads(json.dumps(values, default=str))
