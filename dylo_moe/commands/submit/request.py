"""A command line of `dylora submit`, read and checked before anything is sent, with the parser of `dylora train`."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from dylo_moe.commands.submit.arguments import IN_CLEAR, SPOT, SUBMIT_LINE, CloudArguments, submit_refusal
from dylo_moe.commands.submit.machines import Machine
from dylo_moe.commands.submit.start import ARTIFACT_VARIABLE
from dylo_moe.data.config import DataConfig
from dylo_moe.data.sources.locate import locate
from dylo_moe.parsing.parser import Parser, build_parser, check_every_word_has_a_flag, parse
from dylo_moe.parsing.recipe import with_recipe
from dylo_moe.training.arguments import ModelArguments
from dylo_moe.training.preflight import flag_problems
from dylo_moe.training.tracking import REFERENCE
from dylo_moe.training.trainer_arguments import ArgumentsElsewhere, TrainArguments, check_four_bit
from dylo_moe.utils.errors import UsageError

OF_THE_MACHINE = ("tf32", "use_liger_kernel")
"""Flags whose values depend on the machine that trains, which is another one: the job itself checks them."""

OF_FILES = (  # noqa: SIM905
    "fsdp_config accelerator_config lr_scheduler_kwargs gradient_checkpointing_kwargs liger_kernel_config"
).split()
"""Flags of the Trainer that take JSON, or the path of a file with it."""


class SubmitRequest(NamedTuple):
    """What `dylora submit` was asked for."""

    options: CloudArguments
    machine: Machine
    flags: list[str]
    """The flags of the training, from the command line and the recipe."""
    artifact: str | None
    """A checkpoint at Weights & Biases that the run begins from."""
    warnings: list[str]


def build_submit_parser(*, show_all: bool = False) -> Parser:
    """The parser of `dylora submit`."""
    return build_parser(SUBMIT_LINE, ArgumentsElsewhere, show_all=show_all)


def parse_submit(argv: Sequence[str]) -> SubmitRequest:
    """Read the command line and the recipe that it names, without reaching the network or the job's files.

    Raises:
        UsageError: for an unknown or refused flag, a value out of range, a path that does not exist in the job, or a
            secret in clear.
    """
    parser = build_submit_parser()
    words = with_recipe(argv, parser, submit_refusal)
    _check_nothing_in_clear(words)
    groups = _by_flag(words, parser)
    here = {name: values for name, values in groups.items() if name not in OF_THE_MACHINE}
    options, model, experts, router, data, train = parse(parser, _as_words(here), submit_refusal)
    check_every_word_has_a_flag(words, parser)
    parser.parse_args(words)  # checks the form of every value, also of flags that only the job's machine can check
    if importlib.util.find_spec("bitsandbytes") is not None:
        check_four_bit(model, train)
    artifact = train.wandb_checkpoint_artifact or os.environ.get(ARTIFACT_VARIABLE) or None
    problems = flag_problems(experts, router, train)
    problems += [*_place_problems(model, data, groups), *_tracking_problems(options, train, artifact)]
    if "fsdp" in groups and options.machine.accelerator_count < 2:
        problems.append(
            f"fsdp shares the base among the processes of several accelerators, and {options.machine.machine_type} has "
            f"{options.machine.accelerator_count}; leave it out, or take a larger machine"
        )
    if problems:
        raise UsageError("; ".join(problems))
    own = {item.name for item in fields(CloudArguments)} | {"wandb_checkpoint_artifact"}
    flags = _as_words({name: values for name, values in groups.items() if name not in own})
    return SubmitRequest(options, options.machine, flags, artifact, _warnings(options, train))


def _by_flag(words: list[str], parser: Parser) -> dict[str, list[str]]:
    """Group the values by flag, under its first name; where a flag is given twice, the later wins, as in the parser."""
    groups: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            flag, sign, value = word.partition("=")
            action = parser._option_string_actions.get(flag)
            name = (action.option_strings[0] if action is not None else flag)[
                2:
            ]  # --no_X is a flag of its own, not an alias
            groups.pop(name, None)
            groups[name] = [value] if sign else []
        elif name is not None:
            groups[name].append(word)
    return groups


def _as_words(groups: dict[str, list[str]]) -> list[str]:
    return [word for name, values in groups.items() for word in [f"--{name}", *values]]


def _check_nothing_in_clear(words: list[str]) -> None:
    """Raise UsageError for a word that looks like a key, without showing it, because many people can read a job."""
    flag = ""
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        if any(IN_CLEAR.fullmatch(part) for part in re.split(r"[,=]", word)):
            raise UsageError(
                f"a value of {flag or 'the command line'} looks like a key in clear, and a job is stored as it is "
                "sent: put it into Secret Manager and give --secrets NAME=SECRET:latest"
            )


def _place_problems(model: ModelArguments, data: DataConfig, groups: dict[str, list[str]]) -> list[str]:
    """List the paths of the training that the job cannot read: it has only its container, buckets and the hub."""
    problems = []
    for name in data.datasets:
        if name.startswith("/gcs/"):
            continue
        try:
            place = None if name.startswith("gs://") else locate(name)
        except ValueError as error:
            problems.append(str(error))
            continue
        if place is None or place.path is not None:
            problems.append(_elsewhere("datasets has", name))
    if data.data_dir is not None and not data.data_dir.startswith("/gcs/"):
        problems.append(_elsewhere("data_dir is", data.data_dir))
    is_path = model.model.startswith(("/", ".", "~", "gs://")) or Path(model.model).exists()
    if is_path and not model.model.startswith("/gcs/"):
        problems.append(_elsewhere("model is", model.model))
    for name in OF_FILES:
        path = "".join(groups.get(name, []))
        if path and not path.startswith(("{", "/gcs/")):
            problems.append(
                f"{name} is the file {path} of this machine, which is not sent with the job: give its content as JSON"
            )
    return problems


def _elsewhere(what: str, path: str) -> str:
    if path.startswith("gs://"):
        return f"{what} {path}; in the job buckets are folders: write /gcs/{path[len('gs://') :]}"
    name = Path(path).name
    return (
        f"{what} {path}, which is on this machine and not in the job: copy it with `gcloud storage cp -r {path} "
        f"gs://BUCKET/data/{name}`, and write /gcs/BUCKET/data/{name}"
    )


def _tracking_problems(options: CloudArguments, train: TrainArguments, artifact: str | None) -> list[str]:
    problems = []
    if artifact and not REFERENCE.fullmatch(artifact):
        problems.append(f"wandb_checkpoint_artifact is {artifact!r}; it must be ENTITY/PROJECT/NAME:ALIAS")
    is_offline = "WANDB_MODE=offline" in options.env or "WANDB_MODE=disabled" in options.env
    is_tracked = "wandb" in list(train.report_to or ()) and not is_offline
    if (artifact or is_tracked) and "WANDB_API_KEY" not in options.secret_references:
        why = "report_to is wandb" if is_tracked else "wandb_checkpoint_artifact is given"
        problems.append(
            f"{why}, which needs a key in the job: --secrets WANDB_API_KEY=SECRET:latest (docs/vertex.md stores one)"
        )
    return problems


def _warnings(options: CloudArguments, train: TrainArguments) -> list[str]:
    strategy = str(getattr(train.save_strategy, "value", train.save_strategy))
    if options.strategy != SPOT or strategy == "steps":
        return []
    lost = "all that was trained" if strategy == "no" else "up to an epoch of training"
    return [
        f"strategy is SPOT and save_strategy is {strategy}: when the machine is preempted, {lost} can be lost. Add "
        "--save_strategy steps --save_steps N --save_total_limit 2"
    ]
