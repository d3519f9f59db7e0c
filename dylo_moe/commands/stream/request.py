"""A command line of `dylora stream`, read with the recipe that it names and the stream that it resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.commands.stream.arguments import (
    STREAM_CONFIGS,
    STREAM_LINE,
    StageOptions,
    StreamArguments,
    stream_refusal,
)
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.data.config import DataConfig
from dylo_moe.experts.config import ExpertConfig
from dylo_moe.parsing.parser import Parser, build_parser, parse, typed_flags
from dylo_moe.parsing.recipe import as_words, in_full, last_value, plain_settings, with_recipe
from dylo_moe.routing.config import RouterConfig
from dylo_moe.training.arguments import ModelArguments
from dylo_moe.training.resume import LOCATIONS, Resumption, named_run, shared_out
from dylo_moe.training.run_folder import CONFIG_FILE, STREAM_FILE
from dylo_moe.training.saved_state import read_settings
from dylo_moe.training.trainer_arguments import TrainArguments, check_four_bit
from dylo_moe.utils import distributed
from dylo_moe.utils.checks import COUNT
from dylo_moe.utils.differences import differences, in_words
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.typed_json import read_json, shown
from dylo_moe.utils.words import counted

CHECKPOINT_DECIDES = (  # noqa: SIM905
    "model lora_r lora_alpha use_rslora lora_dropout lora_targets top_k router_top_p router_layer granularity "
    "router_half_life router_change_rate load_in_4bit"
).split()
"""Flags that describe a new model, and so cannot apply where --checkpoint gives one."""

MAY_CHANGE = (*LOCATIONS, "per_device_eval_batch_size", "save_steps", "save_total_limit", "dataloader_num_workers")

MAY_CHANGE_PREFIXES = ("logging_", "log_")
"""Settings that may differ when a stream is resumed: those of `MAY_CHANGE`, and those with these prefixes."""


@dataclass
class StageArguments(StageOptions, TrainArguments):  # type: ignore[misc]
    """The Trainer's arguments for each stage of a stream, with our defaults where they differ from `dylora train`'s."""

    @classmethod
    def problems_of(cls, values: Mapping[str, Any]) -> list[str]:
        """The problems as of `TrainArguments`; within a stage there are evaluations for early stopping alone."""
        is_asked = values.get("early_stopping_patience") is not None
        problems = super().problems_of({**values, "eval_strategy": "steps" if is_asked else "no"})
        needless = [name for name in ("eval_steps", "early_stopping_threshold") if values.get(name) and not is_asked]
        return problems + [f"{name} is given without early_stopping_patience, which it is for" for name in needless]


class StreamRequest(NamedTuple):
    """Everything a stream was asked for."""

    model: ModelArguments
    experts: ExpertConfig
    router: RouterConfig
    stream: StreamArguments
    growth: GrowthConfig
    data: DataConfig
    train: StageArguments
    resumed: Path | None = None
    """The folder of the stream that is resumed; None: the stream is new."""
    processes: int = 1
    """The number of processes that the stream was begun with, which config.yaml holds the rows of a step for."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the stream, with every default filled in, as plain values."""
        ours = (self.model, self.experts, self.router, self.stream, self.growth, self.data)
        return plain_settings(ours, self.train, stream_refusal)


def build_stream_parser(*, show_all: bool = False) -> Parser:
    """The parser of `dylora stream`."""
    return build_parser(STREAM_LINE, StageArguments, show_all=show_all)


def parse_stream(argv: Sequence[str]) -> StreamRequest:
    """Read the command line and the recipe that it names.

    Raises:
        UsageError: for an unknown or refused flag, a value out of range, or settings that are not those of the stream
            to resume.
    """
    parser = build_stream_parser()
    words = with_recipe(_split_ranks(argv), parser, stream_refusal)
    wanted = last_value(words, "--resume_from_checkpoint")
    resumed = named_run(wanted, last_value(words, "--output_dir"), is_resumable_stream) if wanted else None
    saved: dict[str, Any] = {}
    processes = distributed.num_ranks()
    if resumed is not None:
        saved, processes = _settings_in(resumed)
        begun = Resumption(resumed, resumed, saved, {"world_size": processes})
        saved = shared_out(begun, distributed.num_ranks())
        words = [*as_words(saved), f"--output_dir={resumed}", *words]
    model, experts, router, stream, growth, data, train = parse(parser, words, stream_refusal)
    check_four_bit(model, train)
    request = StreamRequest(model, experts, router, stream, growth, data, train, resumed, processes)
    _check(request, given=typed_flags(words))
    if resumed is not None:
        if train.output_dir != str(resumed):
            raise UsageError(f"a stream is resumed in its own folder, {resumed}; leave output_dir out")
        offered = {name: value for name, value in in_full(saved, STREAM_CONFIGS).items() if not stream_refusal(name)}
        _check_unchanged(resumed, offered, request.settings)
    return request


def _split_ranks(argv: Sequence[str]) -> list[str]:
    """Split `--ranks 8,16,32` into separate words, as the parser reads lists of numbers."""
    words, is_rank = [], False
    for word in argv:
        name, sign, value = word.partition("=")
        if name == "--ranks" and sign:
            words += [name, *value.split(",")]
            continue
        is_rank = word == "--ranks" or (is_rank and not word.startswith("--"))
        words += [part for part in word.split(",") if part] if is_rank else [word]
    return words


def _check(request: StreamRequest, given: set[str]) -> None:
    """Raise UsageError for flags that contradict each other."""
    stream, data, problems = request.stream, request.data, []
    if stream.ranks and len(stream.ranks) != len(data.datasets):
        problems.append(
            f"ranks has {counted(len(stream.ranks), 'value')} for {counted(len(data.datasets), 'dataset')}; "
            "give one each"
        )
    others = [*stream.eval_datasets, *stream.known_datasets, *stream.base_datasets]
    twice = sorted({*others} & {*data.datasets}) + sorted({name for name in others if others.count(name) > 1})
    if twice:
        problems.append(f"{', '.join(twice)} is named for two purposes; a dataset has one")
    if stream.checkpoint is not None and request.resumed is None:
        made = [f"--{name}" for name in CHECKPOINT_DECIDES if name in given]
        if made:
            problems.append(f"{', '.join(made)} cannot apply: the checkpoint says what its model is made of")
    if problems:
        raise UsageError("; ".join(problems))


def is_resumable_stream(folder: Path) -> bool:
    """Whether a folder holds a stream that can be resumed."""
    return (folder / CONFIG_FILE).is_file() and (folder / STREAM_FILE).is_file()


def _settings_in(run: Path) -> tuple[dict[str, Any], int]:
    """Read the settings of a stream, and the number of processes that it was begun with."""
    if not is_resumable_stream(run):
        raise UsageError(f"{run} is not a stream that can be resumed: it needs {CONFIG_FILE} and {STREAM_FILE}")
    settings = read_settings(run / CONFIG_FILE)
    try:
        view = read_json(run / STREAM_FILE)
    except ValueError:  # resuming writes it again
        view = {}
    processes = view.get("processes", 1) if isinstance(view, dict) else 1
    if not COUNT.holds(processes):
        raise UsageError(
            f"{run / STREAM_FILE} says that there were {shown(processes)} processes; delete it, or correct it"
        )
    return settings, processes


def _check_unchanged(run: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        item
        for item in differences(saved, now)
        if item.name not in MAY_CHANGE and not item.name.startswith(MAY_CHANGE_PREFIXES)
    ]
    if changed:
        raise UsageError(f"cannot resume {run} with other settings: {in_words(changed)}. Leave them out")
