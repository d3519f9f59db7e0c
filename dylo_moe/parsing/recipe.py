"""Recipes: YAML files of `flag: value` lines, and the command lines that mean the same."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from dylo_moe.parsing.command_line import SHOWN_FLAGS, Refusal
from dylo_moe.parsing.flags import as_typed, flags_of, values_of
from dylo_moe.parsing.parser import Parser, options, unknown, value_problem
from dylo_moe.parsing.recipe_file import recipe_file
from dylo_moe.training.trainer_arguments import TrainArguments
from dylo_moe.utils.errors import UsageError

MAPPINGS = ("_kwargs", "_config")
"""The ends of the names of flags whose value is a mapping."""

PAIRS = ("columns", "mix")
"""Flags that take words KEY=VALUE; in a recipe they may also be a mapping."""

NOT_SETTINGS = ("output_dir", "resume_from_checkpoint", "wandb_checkpoint_artifact", "fsdp", "fsdp_config")
"""Flags that are not part of a run's settings: they say where it is written, what it resumes from, and how its
processes share the work, and do not change what is trained."""


def with_recipe(argv: Sequence[str], parser: Parser, refusal: Refusal) -> list[str]:
    """Replace --config in a command line, if it is there, by the recipe's words; typed flags come later, and so win.

    Returns:
        Words in which every flag with one value is written `--flag=value`.

    Raises:
        UsageError: for a recipe that cannot be read, or has a flag that the parser does not offer.
    """
    recipe, rest = split_recipe(argv)
    words = _words_of_file(recipe_file(recipe), parser, refusal) if recipe else []
    return parser.with_values([*words, *rest])


def last_value(words: Sequence[str], flag: str) -> str | None:
    """The last value of a flag in words of `with_recipe`; None where the flag is not there."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return values[-1] if values else None


def split_recipe(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split a command line into the recipe that --config names, None where it is not there, and the other words.

    Raises:
        UsageError: for --config without a value, or given twice.
    """
    recipe, rest = None, []
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            if recipe is not None:
                raise UsageError("--config is given twice; a run has one recipe")
            recipe = word[len("--config=") :] if "=" in word else next(words, None)
            if not recipe or recipe.startswith("--"):
                raise UsageError("--config needs the path of a YAML recipe, or the name of one that comes with dylora")
        else:
            rest.append(word)
    return recipe, rest


def _words_of_file(path: Path, parser: Parser, refusal: Refusal) -> list[str]:
    """Read a recipe into the command line that means the same.

    A value is taken as it is written in the file, as on the command line: `save_strategy: no` is the word no.
    """
    try:
        recipe = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path}{_explained(error)}") from error
    if not isinstance(recipe, yaml.MappingNode):
        kind = "empty" if recipe is None else "a list" if isinstance(recipe, yaml.SequenceNode) else "one value"
        raise UsageError(f"recipe {path} must be `flag: value` lines; it is {kind}")
    words: list[str] = []
    problems: list[str] = []
    lines: dict[str, int] = {}
    for key, value in recipe.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name.startswith("--"):
            problems.append(f"line {line}: {name} is written without dashes in a recipe")
        elif f"--{name}" not in options(parser) or refusal(name):
            said = unknown(f"--{name}", parser, refusal).replace("--help", "-help")
            problems.append(f"line {line}: " + said.replace("--", "").replace("-help", "--help"))
        elif name in lines:
            problems.append(f"line {line}: {name} is there already, in line {lines[name]}")
        else:
            found = _value_problems(name, value, parser)
            problems += [f"line {line}: {problem}" for problem in found]
            words += [] if found else as_words({name: _value(name, value, parser)})
        lines.setdefault(name, line)
    if problems:
        raise UsageError(f"recipe {path}: {'; '.join(problems)}")
    return words


def _value_problems(name: str, node: yaml.Node, parser: Parser) -> list[str]:
    """What is wrong with the value of a recipe's line, beside others."""
    action = parser.action(f"--{name}")
    is_list = isinstance(node, yaml.SequenceNode)
    if isinstance(node, yaml.MappingNode) and name not in PAIRS:
        return [] if name.endswith(MAPPINGS) else [f"{name} takes {_kind(action)}, and no mapping"]
    if isinstance(node, yaml.MappingNode):
        try:
            _pairs(node)
        except UsageError as error:
            return [f"in {name} {error}"]
        return []
    is_flat = not is_list or all(isinstance(item, yaml.ScalarNode) for item in node.value)
    if not is_flat or (is_list and len(node.value) > 1 and action.nargs not in ("+", "*")):
        return [f"{name} takes {_kind(action)}"]
    values = _plain(node, parser.is_switch(f"--{name}"))
    if values is None:
        return []
    texts = [str(item) for item in (values if is_list else [values])]
    flags = [f"{text} in a list would be a flag; give it a line of its own" for text in texts if text.startswith("--")]
    return flags if is_list and flags else [found for text in texts if (found := value_problem(action, text))]


def _kind(action: argparse.Action) -> str:
    return "words, separated by commas or as a list" if action.nargs in ("+", "*") else "one value"


def _value(name: str, node: yaml.Node, parser: Parser) -> Any:
    if name in PAIRS and isinstance(node, yaml.MappingNode):
        return _pairs(node)
    return _plain(node, parser.is_switch(f"--{name}"))


def _plain(node: yaml.Node, is_switch: bool) -> Any:
    """The value of a recipe's line: text as it is written, a list of such texts, or a mapping."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, is_switch) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _typed(node)
    if is_switch and node.tag == "tag:yaml.org,2002:bool":
        return yaml.SafeLoader("").construct_object(node)
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _typed(node: yaml.Node) -> Any:
    """A value within a mapping, of which no flag says the type: a number where it is written as one, 1e-5 too, which
    YAML takes for a word."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _typed(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_typed(item) for item in node.value]
    if node.tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"):
        return yaml.SafeLoader("").construct_object(node)
    if isinstance(node, yaml.ScalarNode) and not node.style:  # what stands in quotes is a word
        for kind in (int, float):
            try:
                return kind(node.value)
            except ValueError:
                continue
    return node.value


def _pairs(mapping: yaml.MappingNode, before: str = "") -> list[str]:
    """The words KEY=VALUE of a mapping; a mapping within it gives OUTER.KEY=VALUE.

    Raises:
        UsageError: for a value that is a list.
    """
    words = []
    for key, value in mapping.value:
        name = f"{before}{key.value}"
        if isinstance(value, yaml.MappingNode):
            words += _pairs(value, f"{name}.")
        elif isinstance(value, yaml.SequenceNode):
            raise UsageError(f"{name} has a list; it must be one value")
        else:
            words.append(f"{name}={value.value}")
    return words


def _explained(error: yaml.YAMLError) -> str:
    """Where a file stops being YAML, and the rule that it breaks."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f" is not valid YAML: {error}"
    place = f", line {mark.line + 1}, column {mark.column + 1}, is not valid YAML: "
    if mark.buffer is not None and "\t" in mark.buffer[mark.pointer : mark.pointer + 1]:
        return place + "there is a tab; YAML is indented with spaces"
    rule = ", ".join(text for text in (getattr(error, "context", None), getattr(error, "problem", None)) if text)
    return place + rule


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as the command line that means the same."""
    words: list[str] = []
    for key, value in settings.items():
        if value is None or value == []:
            continue
        if isinstance(value, list):
            words += [f"--{key}", *(str(item) for item in value)]
        else:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
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
