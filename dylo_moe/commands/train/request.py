"""A command line of `dylora train`, read with the recipe that it names and the run that it resumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.commands.train.arguments import TRAIN_CONFIGS, TRAIN_LINE
from dylo_moe.data.config import DataConfig
from dylo_moe.experts.config import ExpertConfig
from dylo_moe.parsing.command_line import refusal_of
from dylo_moe.parsing.parser import Parser, build_parser, parse
from dylo_moe.parsing.recipe import as_words, in_full, last_value, plain_settings, with_recipe
from dylo_moe.routing.config import RouterConfig
from dylo_moe.training.arguments import ModelArguments
from dylo_moe.training.preflight import Configs
from dylo_moe.training.resume import Resumption, changes, find, shared_out
from dylo_moe.training.run_folder import CONFIG_FILE, NEW_RUN, fresh_folder
from dylo_moe.training.tracking import download_checkpoint
from dylo_moe.training.trainer_arguments import TrainArguments, check_four_bit
from dylo_moe.utils.distributed import from_first, num_ranks
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.words import counted


class Arguments(NamedTuple):
    """Everything a training run was asked for."""

    model: ModelArguments
    experts: ExpertConfig
    router: RouterConfig
    data: DataConfig
    train: TrainArguments
    resumed: Resumption | None = None
    """The run and the checkpoint that this run resumes from; None: it is a new run."""
    changed: tuple[str, ...] = ()
    """Settings that differ from the checkpoint's and may do so, in words."""

    @property
    def configs(self) -> Configs:
        """The configs that were made from the flags."""
        return self.model, self.experts, self.router, self.data, self.train


def build_train_parser(
    *, prog: str = TRAIN_LINE.prog, show_all: bool = False, kind: type[TrainArguments] = TrainArguments
) -> Parser:
    """The parser of `dylora train`; its help hides the Trainer's rarer flags unless `show_all`."""
    return build_parser(TRAIN_LINE._replace(prog=prog), kind, show_all=show_all)


def parse_train(
    argv: Sequence[str],
    *,
    prog: str = TRAIN_LINE.prog,
    num_processes: int | None = None,
    kind: type[TrainArguments] = TrainArguments,
) -> Arguments:
    """Read the command line and the recipe that it names.

    Args:
        prog: the command that is typed.
        num_processes: the number of processes that the run will have; None: as many as it has now.
        kind: the class of the Trainer's arguments.

    Raises:
        UsageError: for an unknown or refused flag (with the nearest known name), or a value out of range.
    """
    parser = build_train_parser(prog=prog, kind=kind)
    count = num_ranks() if num_processes is None else num_processes
    words = with_recipe(argv, parser, refusal_of)
    resumed = _resumption(words)
    if resumed is not None:
        own = resumed.run if (resumed.run / CONFIG_FILE).is_file() else NEW_RUN
        words = [*as_words(shared_out(resumed, count)), f"--output_dir={own}", *words]
    model, experts, router, data, train = parse(parser, words, refusal_of)
    check_four_bit(model, train)
    arguments = Arguments(model, experts, router, data, train, resumed)
    if resumed is None or resumed.checkpoint is None:
        return arguments
    saved = in_full(resumed.settings, TRAIN_CONFIGS)
    processes = (resumed.record.get("world_size", 1), count)
    refused, allowed = changes(saved, settings_of(arguments), processes=processes)
    if refused:
        raise UsageError(
            f"cannot resume from {resumed.checkpoint} with other settings: {'; '.join(refused)}. Leave them out, or "
            "start a new run"
        )
    if processes[0] != processes[1]:
        allowed.append(
            f"the run has {counted(processes[1], 'process', 'processes')}, had {processes[0]}: a step has the same rows"
        )
    return arguments._replace(changed=tuple(allowed))


def _resumption(words: list[str]) -> Resumption | None:
    wanted, artifact = last_value(words, "--resume_from_checkpoint"), last_value(words, "--wandb_checkpoint_artifact")
    if wanted and artifact:
        raise UsageError("--resume_from_checkpoint and --wandb_checkpoint_artifact cannot both be given")
    if artifact:
        into = fresh_folder(Path("artifacts"), artifact.rpartition("/")[2])
        wanted = from_first(lambda: str(download_checkpoint(artifact, into)))
    return find(wanted, last_value(words, "--output_dir")) if wanted else None


def settings_of(arguments: Arguments) -> dict[str, Any]:
    """The settings of a run, with every default filled in, as a recipe holds them; `NOT_SETTINGS` are left out."""
    ours = (arguments.model, arguments.experts, arguments.router, arguments.data)
    return plain_settings(ours, arguments.train, refusal_of)
