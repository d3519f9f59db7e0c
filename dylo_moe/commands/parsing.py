"""What the parsers of the commands share: one spelling of each flag, and an answer for every wrong one."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any

from transformers import HfArgumentParser

from dylo_moe.commands.flags import config_from, flags_class, flags_of
from dylo_moe.utils.errors import UsageError

SHOWN_FLAGS = (  # noqa: SIM905
    "output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm bf16 fp16 "
    "lr_scheduler_kwargs label_smoothing_factor gradient_checkpointing logging_steps eval_strategy eval_steps "
    "save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model early_stopping_patience "
    "early_stopping_threshold eval_benchmark eval_benchmark_steps allow_code_execution sandbox resume_from_checkpoint "
    "wandb_checkpoint_artifact report_to run_name seed"
).split()
"""The Trainer's flags that --help shows; all others of the Trainer work too."""

REFUSED = {
    "save_only_model": "training could not go on from it; the run's final folder, checkpoint, is the model alone",
    "ignore_data_skip": "training would not go on where it was",
    "enable_jit_checkpoint": "SIGTERM always saves, at the end of the running step",
    "restore_callback_states_from_checkpoint": "what must be restored always is",
    "neftune_noise_alpha": "noise on the embeddings would change what the router reads",
    "torch_compile": "not tested with routing yet",
    "torch_compile_backend": "not tested with routing yet",
    "torch_compile_mode": "not tested with routing yet",
    "deepspeed": "not tested with routing yet",
    "parallelism_config": "not tested with routing yet",
    "ddp_find_unused_parameters": "experts that no token chose have no gradient, which has to be allowed for",
    "ddp_static_graph": "which experts take part differs from step to step",
    "average_tokens_across_devices": "a step's loss is over the tokens of all processes",
    "dataloader_drop_last": "rows would be left out; where a pass does not come out even, its last batch is smaller",
    "auto_find_batch_size": "it would restart on experts that were already trained",
    "push_to_hub": "upload the checkpoint folder with the `hf` command instead",
    "do_train": "this command always trains",
    "do_eval": "this command evaluates before and after training, and as eval_strategy says",
    "do_predict": "this command does not predict",
    "remove_unused_columns": "the batches hold just what training needs",
    "prediction_loss_only": "evaluation is by loss",
    "label_names": "the batches' labels are called labels",
    "include_for_metrics": "evaluation is by loss",
    "batch_eval_metrics": "evaluation is by loss",
    "eval_on_start": "this command always evaluates before training",
    "disable_tqdm": "this command has its own progress bar",
    "config": "give --config once, on the command line",
}
"""Flags of the Trainer that would do nothing, or something wrong, here; each with the reason."""

REFUSED_PREFIXES = ("hub_", "trackio_")

Refusal = Callable[[str], str | None]
"""Why a flag of that name is not offered; None where it is."""


class Parser(HfArgumentParser):
    """The flags of several config classes; a mistake raises instead of ending the program.

    Args:
        kinds: the classes; the Trainer's arguments come last where they are among them.
    """

    def __init__(self, kinds: Sequence[type], **options: Any) -> None:
        super().__init__([flags_class(kind) for kind in kinds], **options)  # type: ignore[misc]
        self.kinds = tuple(kinds)

    def configs(self, words: Sequence[str]) -> tuple[Any, ...]:
        """What a command line describes, an instance of each class.

        Raises:
            ValueError: with the problems of all classes. The last is only made where the others have no problem, for
                the Trainer's arguments set up the device.
        """
        values = vars(self.parse_args(words))
        made: list[Any] = []
        problems: list[str] = []
        for kind in self.kinds:
            if problems and kind is self.kinds[-1]:
                break
            try:
                made.append(config_from(kind, values))
            except ValueError as error:
                problems.append(str(error).strip())
        if problems:
            raise ValueError("; ".join(problems))
        return tuple(made)

    def error(self, message: str) -> Any:
        """Called with what is wrong."""
        raise UsageError(message)


def plain_options(parser: Parser) -> Parser:
    """Every flag under one spelling, with underscores."""
    for action in parser._actions:
        action.metavar = "VALUE"
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
    return parser


def parse(parser: Parser, words: list[str], refusal: Refusal, given: Sequence[str] = ()) -> tuple[Any, ...]:
    """The configs of a parser; `given` words are not the user's own."""
    _check_names(words, parser, refusal)
    try:
        return parser.configs([*given, *words])
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error).strip()) from error


def parse_behind_checkpoint(argv: Sequence[str], parser: Parser) -> tuple[str, Any, set[str]]:
    """`CHECKPOINT [--FLAG VALUE ...]`: the checkpoint, the dataclass of the flags, and which flags were typed.

    Raises:
        UsageError: where no checkpoint comes first, and as `parse` does.
    """
    words = list(argv)
    if not words or words[0].startswith("--"):
        raise UsageError(
            f"no checkpoint is named; type its folder right behind the command: {parser.prog} RUN/checkpoint"
        )
    (values,) = parse(parser, words[1:], lambda name: None)
    return words[0], values, {word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")}


def options(parser: Parser) -> set[str]:
    """Every flag that a parser knows, with its dashes."""
    return set(parser._option_string_actions)


def _check_names(words: list[str], parser: Parser, refusal: Refusal) -> None:
    problems = []
    for word in words:
        name = word.split("=", 1)[0]
        if name.startswith("--") and (name not in options(parser) or refusal(name[2:])):
            problems.append(unknown(name, parser, refusal))
    if problems:
        raise UsageError("; ".join(problems))


def unknown(name: str, parser: Parser, refusal: Refusal) -> str:
    """What to tell who typed an unknown or refused flag."""
    reason = refusal(name.lstrip("-"))
    if reason:
        return f"{name} is not offered: {reason}"
    offered = [option for option in options(parser) if "-" not in option[2:] and not refusal(option[2:])]
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.5)
    return f"there is no flag {name}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags")


def training_parser(
    prog: str, kinds: tuple[type, ...], *, description: str, refusal: Refusal, show_all: bool
) -> Parser:
    """The parser of a command that trains.

    Args:
        kinds: the dataclasses of its flags, the Trainer's last.
        refusal: which of these flags are not offered.
        show_all: --help shows the Trainer's rarer flags too.
    """
    parser = Parser(
        kinds,
        prog=prog,
        allow_abbrev=False,
        add_help=False,
        usage=f"{prog} [--config RECIPE.yaml] [--FLAG VALUE ...]",
        description=description,
        epilog="Every other flag of transformers.TrainingArguments works too, under its own name: --help_all lists "
        "them. A recipe is a YAML file of `flag: value` lines; flags on the command line win over it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    ours = {flag for kind in kinds[:-1] for flag in flags_of(kind)}
    for action in parser._actions:
        if refusal(action.dest) or (action.dest not in ours | set(SHOWN_FLAGS) and not show_all):
            action.help = argparse.SUPPRESS
    return plain_options(parser)


def refusal_of(name: str) -> str | None:
    """Why `dylora train` does not offer a flag of that name; None where it does."""
    if name.startswith(REFUSED_PREFIXES):
        return "this command has no such destination"
    return REFUSED.get(name)
