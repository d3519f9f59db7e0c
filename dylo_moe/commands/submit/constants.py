"""The constants at the top of submit_full_training.py, read as flags of `dylora submit`.

A constant is a flag in capital letters (MACHINE_TYPE is --machine_type), or one of the few names below. None means that
the flag is not given.
"""

from __future__ import annotations

import os
import re
from argparse import Action
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.hf_argparser import string_to_bool

from dylo_moe import __version__
from dylo_moe.commands.submit.arguments import SPOT, STANDARD, SUBMIT_LINE, CloudArguments, submit_refusal
from dylo_moe.commands.submit.request import build_submit_parser
from dylo_moe.parsing.flags import flags_of
from dylo_moe.parsing.parser import Parser, check_every_word_has_a_flag
from dylo_moe.parsing.recipe import as_words, last_value, split_recipe
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.words import nearest

SCRIPT = "submit_full_training.py"

NAMES = {
    "PROJECT_ID": "gcp_project",
    "BUCKET_NAME": "bucket",
    "USE_SPOT": "strategy",
    "RECIPE": "config",
}
"""Constants that are named differently from the flag that they set."""

IMAGE_PARTS = ("DOCKER_REPO_NAME", "IMAGE_NAME", "IMAGE_TAG")
"""Constants that together name an image of Artifact Registry, in the project and region of the other constants."""

CONSTANT = re.compile(r"[A-Z][A-Z0-9_]*")


def with_constants(module: Mapping[str, Any], typed: Sequence[str]) -> list[str]:
    """Write the constants of a script as flags, and behind them the words that were typed, which therefore win.

    Args:
        module: the script's `globals()`; every name in capital letters in it is a constant.

    Raises:
        UsageError: for an unknown constant, with the nearest known one; for a value of a wrong type; for two constants
            of one flag; where nothing is set and nothing was typed; for a typed word that belongs to no flag. All
            problems of the constants are in one message.
    """
    parser = build_submit_parser()
    constants = {name: value for name, value in module.items() if CONSTANT.fullmatch(name)}
    problems = [problem for name, value in constants.items() if (problem := _problem(name, value, parser))]
    given = {name: value for name, value in constants.items() if value is not None}
    problems += _given_twice(given, parser)
    if problems:
        raise UsageError("; ".join(problems))
    if not given and not typed:
        raise UsageError(
            f"nothing is set: write PROJECT_ID, BUCKET_NAME, DISPLAY_NAME, and IMAGE or DOCKER_REPO_NAME at the top of "
            f"{SCRIPT}, or give flags; --help lists them"
        )
    settings = {_flag(name): _value(name, value) for name, value in given.items() if name not in IMAGE_PARTS}
    recipe, rest = split_recipe(typed)
    words = parser.with_values(rest)
    check_every_word_has_a_flag(words, parser)  # behind the words of the constants, a list would swallow it
    if any(name in given for name in IMAGE_PARTS) and last_value(words, "--image") is None:
        settings["image"] = _image(given, words)
    if recipe is not None:
        settings.pop("config", None)  # a command line has one recipe
    return [*as_words(settings), *typed]


def _flag(name: str) -> str:
    return NAMES.get(name, name.lower())


def _action(name: str, parser: Parser) -> Action | None:
    """The flag that a constant sets; None for the recipe and the parts of an image, which the parser does not know."""
    return parser._option_string_actions.get(f"--{_flag(name)}")


def _known(parser: Parser) -> list[str]:
    """The constants that there can be: one for each flag that is offered, without the --no_FLAG twins of switches."""
    flags = [flag[2:] for flag in parser._option_string_actions if "-" not in flag[2:]]
    offered = [flag for flag in flags if not flag.startswith("no_") and not submit_refusal(flag)]
    return [*NAMES, *IMAGE_PARTS, *(flag.upper() for flag in offered)]


def _problem(name: str, value: Any, parser: Parser) -> str | None:
    """Say what is wrong with a constant; None where nothing is."""
    kinds: tuple[type, ...]
    if name in IMAGE_PARTS or name == "RECIPE":
        kinds, rule = (str,), "a text"
    elif name == "USE_SPOT":
        kinds, rule = (bool,), "True or False"
    elif (action := _action(name, parser)) is None or name.startswith("NO_"):
        return f"there is no constant {name}; did you mean {nearest(name, _known(parser), cutoff=0)}?"
    elif reason := submit_refusal(_flag(name)):
        return f"{name} is not offered: {reason}"
    else:
        kinds, rule = _types(action)
    items = value if isinstance(value, list | tuple) and list in kinds else [value]
    if value is None or all(type(item) in kinds and type(item) is not list for item in items):
        return None
    return f"{name} is {value!r}; it must be {rule}, or None"


def _types(action: Action) -> tuple[tuple[type, ...], str]:
    """The types that the value of a flag may have, and how a message says it."""
    if action.type is string_to_bool:
        return (bool,), "True or False"
    if action.type is int:
        return (int,), "a whole number"
    if action.type is float:
        return (float, int), "a number"
    if action.nargs == "+":
        return (str, list), "a list of texts"
    fields = {flag: item for kind in SUBMIT_LINE.kinds for flag, item in flags_of(kind).items()}
    if action.dest in fields and "read" in fields[action.dest].metadata:
        return (str, int, float), "a text or a number"
    return (str,), "a text"


def _given_twice(given: Mapping[str, Any], parser: Parser) -> list[str]:
    """Say which of the constants that are set mean the same flag."""
    groups: dict[str, list[str]] = {}
    for name in given:
        action = _action(name, parser)
        flag = "image" if name == "DOCKER_REPO_NAME" else name if action is None else action.dest
        groups.setdefault(flag, []).append(name)
    problems = [f"{' and '.join(names)} are the same; set one of them" for names in groups.values() if len(names) > 1]
    parts = [name for name in IMAGE_PARTS[1:] if name in given and "DOCKER_REPO_NAME" not in given]
    return problems + [f"{name} cannot apply without DOCKER_REPO_NAME; or give the whole IMAGE" for name in parts]


def _value(name: str, value: Any) -> Any:
    if name == "USE_SPOT":
        return SPOT if value else STANDARD
    if name == "BUCKET_NAME" and not value.startswith("gs://"):
        return f"gs://{value}"
    return list(value) if isinstance(value, tuple) else value


def _image(given: Mapping[str, Any], words: Sequence[str]) -> str:
    """The image that DOCKER_REPO_NAME means: as build_and_push.sh pushes it, with the version as its tag."""
    region = given.get("REGION") or last_value(words, "--region") or CloudArguments.region
    project = given.get("PROJECT_ID") or given.get("GCP_PROJECT") or last_value(words, "--gcp_project")
    project = project or os.environ.get("GOOGLE_CLOUD_PROJECT")
    if not project:
        raise UsageError("DOCKER_REPO_NAME is a repository of a project: set PROJECT_ID, or the whole IMAGE instead")
    name = f"{given.get('IMAGE_NAME', 'dylora-moe')}:{given.get('IMAGE_TAG', __version__)}"
    return f"{region}-docker.pkg.dev/{project}/{given['DOCKER_REPO_NAME']}/{name}"
