"""The flags of `dylora train`: ours, the Trainer's under the Trainer's names, and recipes in YAML."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_liger_kernel_available

from .base import DEFAULT_BASE, NEEDS_BITSANDBYTES
from .config import (
    BALANCE_COEFFICIENT,
    LEARNED,
    LORA_ALPHA,
    LORA_DROPOUT,
    LORA_R,
    NUM_EXPERTS,
    RANDOM,
    SEQUENCE,
    TOKEN,
    UNIFORM,
    DataConfig,
    RouterConfig,
)
from .flags import Parser, Refusal, UsageError, parse, plain_options
from .ranks import from_first, num_ranks
from .recipe import as_words, last_value, with_recipe
from .resume import CONFIG_FILE, Resumption, changes, find, shared_out
from .tracking import download_checkpoint

SHOWN = (  # noqa: SIM905
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
NEW_RUN = "new"
NOT_SETTINGS = ("output_dir", "resume_from_checkpoint", "wandb_checkpoint_artifact", "fsdp", "fsdp_config")
"""Where a run is written and goes on from, and how its processes share the work: none of it makes another run of it."""
REFUSED_PREFIXES = ("hub_", "trackio_")


@dataclass
class ModelArguments:
    """Our flags: the base, its experts and the router."""

    model: str = field(
        default=DEFAULT_BASE,
        metadata={"help": "Base model: a hub id, a folder, or smollm2-135m (small, needs no hub and no token)."},
    )
    num_experts: int = field(default=NUM_EXPERTS, metadata={"help": "Experts trained together."})
    lora_r: int = field(default=LORA_R, metadata={"help": "Rank of each expert."})
    lora_alpha: int = field(default=LORA_ALPHA, metadata={"help": "LoRA alpha; an expert is scaled by alpha / rank."})
    lora_dropout: float = field(default=LORA_DROPOUT, metadata={"help": "Dropout on the experts' input."})
    lora_targets: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the linears that carry experts; all-linear: every one in the routed layers."},
    )
    top_k: int = field(default=RouterConfig.top_k, metadata={"help": "Experts per token, 1 to num_experts."})
    router_layer: str = field(
        default=str(RouterConfig.router_layer),
        metadata={
            "help": "Where the router reads: embeddings, a layer's index (7), a fraction of the depth (0.25), or "
            "final. Deeper tells apart skills of the same words, but layers below it carry no experts; final runs the "
            "base twice."
        },
    )
    granularity: str = field(
        default=RouterConfig.granularity,
        metadata={
            "help": "What is routed: each token on its own, or a sequence as a whole, decided on its prompt.",
            "choices": [TOKEN, SEQUENCE],
        },
    )
    router_policy: str = field(
        default=RouterConfig.policy,
        metadata={
            "help": "Who routes: a gate that learns; or, to compare with it, uniform (each token to all experts alike) "
            "or random (to top_k experts that have nothing to do with what the text says).",
            "choices": [LEARNED, UNIFORM, RANDOM],
        },
    )
    router_half_life: float = field(
        default=RouterConfig.router_half_life,
        metadata={"help": "Half-life of the router's memory, in tokens; shorter follows a change of subject faster."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the base: eager, sdpa, flash_attention_2, ...; default: Transformers' choice."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Hold the base's linears in 4 bits (QLoRA's NormalFloat with double quantisation); products are "
            "computed in the base's dtype, with --bf16 in bf16. Needs bitsandbytes."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose logits exist at once where the loss is computed; 0: all. Default: all of a small "
            "vocabulary, of a large one (100,000 entries) as many as take 256 MiB."
        },
    )
    balance_coefficient: float = field(
        default=BALANCE_COEFFICIENT, metadata={"help": "Weight of the loss that keeps the experts evenly used."}
    )
    z_loss_coefficient: float = field(
        default=RouterConfig.z_loss_coefficient, metadata={"help": "Weight of the router z-loss."}
    )
    entropy_coefficient: float = field(
        default=RouterConfig.entropy_coefficient,
        metadata={"help": "Weight of the entropy of a token's routing; above 0 makes the router surer."},
    )

    def __post_init__(self) -> None:
        if self.loss_chunk_size is not None and self.loss_chunk_size < 0:
            raise ValueError(f"loss_chunk_size is {self.loss_chunk_size}; it must be at least 0")


@dataclass
class TrainArguments(TrainingArguments):
    """The Trainer's arguments, with our defaults where they differ from its own."""

    output_dir: str = field(
        default=NEW_RUN, metadata={"help": "Where the run is written; must be new or empty. new: runs/ and the time."}
    )
    num_train_epochs: float = field(
        default=10.0, metadata={"help": "Passes over the training rows.", "aliases": ["--num_epochs"]}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of experts and gate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate while training: no, steps, epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save while training: no, steps, epoch."})
    load_best_model_at_end: bool = field(
        default=False,
        metadata={"help": "End with the checkpoint of the lowest eval_loss (--metric_for_best_model), not the last."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations in a row whose eval_loss did not fall."}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much eval_loss must fall to count, in nats per token."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on with a run: its folder, one of its checkpoints, or latest, the newest in --output_dir; "
            "auto: the same, and a new run where --output_dir has none. Settings are the checkpoint's; those that are "
            "given are compared with them."
        },
    )
    wandb_checkpoint_artifact: str | None = field(
        default=None,
        metadata={"help": "The same, from a checkpoint kept by Weights & Biases: ENTITY/PROJECT/NAME:ALIAS."},
    )
    eval_benchmark: str | None = field(
        default=None,
        metadata={"help": "Also judge programs while training: humaneval:20 (its first 20 problems), mbpp, or both."},
    )
    eval_benchmark_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps between these; needed with eval_benchmark."}
    )
    allow_code_execution: bool | None = field(
        default=None, metadata={"help": "Run what the model writes, in isolation; eval_benchmark needs it."}
    )
    sandbox: str | None = field(
        default=None, metadata={"help": "How it is isolated, as in dylora eval; default: bubblewrap."}
    )
    include_num_input_tokens_seen: str = field(  # the Trainer's own takes no word from a command line
        default="no",
        metadata={"help": "Log the tokens seen: no, all, non_padding.", "choices": ["no", "all", "non_padding"]},
    )
    save_only_model: bool = field(default=False, metadata={"help": "Not offered."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not offered."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Not offered."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches in memory; default where a GPU is."}
    )
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Not offered."})

    def __post_init__(self) -> None:
        has_evaluations = str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no"
        if has_evaluations and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # so that the best checkpoint is known and kept
        if str(self.fsdp).lower() in ("true", "false"):  # as a recipe says it
            self.fsdp = True if str(self.fsdp).lower() == "true" else None  # type: ignore[assignment]
        if self.fsdp_config and not self.fsdp:
            raise ValueError(
                "fsdp_config is given, but nothing is shared without --fsdp true; add that, or leave it out"
            )
        super().__post_init__()
        self._check_rows_are_shared_evenly()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process trains on one GPU; several are for torchrun and accelerate launch
        patience = self.early_stopping_patience
        if patience is not None and (patience < 1 or not has_evaluations):
            rule = "it must be at least 1" if patience < 1 else "but eval_strategy is no, so nothing is evaluated"
            raise ValueError(f"early_stopping_patience is {patience}; {rule}")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("use_liger_kernel needs Liger's kernels: pip install liger-kernel")
        if self.use_liger_kernel and self.device.type == "cpu":
            raise ValueError("use_liger_kernel needs a GPU, for which its kernels are written; leave it out")

    def _check_rows_are_shared_evenly(self) -> None:
        fixed = {"split_batches": False, "dispatch_batches": None, "even_batches": True}
        others = [name for name, ours in fixed.items() if getattr(self.accelerator_config, name) not in (ours, None)]
        if others:
            raise ValueError(
                f"accelerator_config sets {', '.join(others)}, but how processes share rows is fixed: each takes "
                "per_device_train_batch_size at once"
            )


class Arguments(NamedTuple):
    """Everything a training run was asked for."""

    model: ModelArguments
    data: DataConfig
    train: TrainArguments
    resumed: Resumption | None = None
    """What the run goes on from."""
    changed: tuple[str, ...] = ()
    """Settings that are not those of the checkpoint, and may be others."""


def build_parser(prog: str, *, show_all: bool = False) -> HfArgumentParser:
    """The parser of `dylora train`; its help hides the Trainer's rarer flags unless `show_all`."""
    return training_parser(
        prog,
        (ModelArguments, DataConfig, TrainArguments),
        description="Train several LoRA experts and their router together on one frozen model.",
        refusal=refusal_of,
        show_all=show_all,
    )


def training_parser(
    prog: str, kinds: tuple[type, ...], *, description: str, refusal: Refusal, show_all: bool
) -> HfArgumentParser:
    """The parser of a command that trains.

    Args:
        kinds: the dataclasses of its flags, the Trainer's last.
        refusal: which of these flags are not offered.
        show_all: --help shows the Trainer's rarer flags too.
    """
    parser = Parser(
        kinds,  # type: ignore[arg-type]
        prog=prog,
        allow_abbrev=False,
        add_help=False,
        usage=f"{prog} [--config RECIPE.yaml] [--FLAG VALUE ...]",
        description=description,
        epilog="Every other flag of transformers.TrainingArguments works too, under its own name: --help_all lists "
        "them. A recipe is a YAML file of `flag: value` lines; flags on the command line win over it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    ours = {item.name for kind in kinds[:-1] for item in fields(kind)}
    for action in parser._actions:
        if refusal(action.dest) or (action.dest not in ours | set(SHOWN) and not show_all):
            action.help = argparse.SUPPRESS
    return plain_options(parser)


def refusal_of(name: str) -> str | None:
    """Why `dylora train` does not offer a flag of that name; None where it does."""
    if name.startswith(REFUSED_PREFIXES):
        return "this command has no such destination"
    return REFUSED.get(name)


def parse_train(argv: Sequence[str], *, prog: str = "dylora train", num_processes: int | None = None) -> Arguments:
    """Read the command line and the recipe it names.

    Args:
        num_processes: that the run will have; None: as many as it has.

    Raises:
        UsageError: for an unknown or refused flag (with the nearest known name), or a value out of range.
    """
    parser = build_parser(prog)
    count = num_ranks() if num_processes is None else num_processes
    words = with_recipe(argv, parser, refusal_of)
    resumed = _resumption(words)
    if resumed is not None:
        own = resumed.run if (resumed.run / CONFIG_FILE).is_file() else NEW_RUN
        words = [*as_words(shared_out(resumed, count)), "--output_dir", str(own), *words]
    model, data, train = parse(parser, words, refusal_of)
    check_four_bit(model, train)
    model.lora_targets = [name for part in model.lora_targets for name in part.split(",") if name]
    arguments = Arguments(model, data, train, resumed)
    if resumed is None or resumed.checkpoint is None:
        return arguments
    saved = in_full(resumed.settings, (ModelArguments, DataConfig))
    processes = (resumed.record.get("world_size", 1), count)
    refused, allowed = changes(saved, settings_of(arguments), processes=processes)
    if refused:
        raise UsageError(
            f"cannot go on from {resumed.checkpoint} with other settings: {'; '.join(refused)}. Leave them out, or "
            "start a new run"
        )
    if processes[0] != processes[1]:
        allowed.append(f"the run has {processes[1]} processes, had {processes[0]}: a step has the same rows")
    return arguments._replace(changed=tuple(allowed))


def in_full(saved: dict[str, Any], kinds: tuple[type, ...]) -> dict[str, Any]:
    """The settings of a run, whose version may not have had every flag of today's: those were at their default."""
    return {item.name: item.default for kind in kinds for item in fields(kind) if item.default is not MISSING} | saved


def check_four_bit(model: ModelArguments, train: TrainArguments) -> None:
    """Raises UsageError where load_in_4bit cannot apply."""
    if not model.load_in_4bit:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"load_in_4bit cannot apply here: {NEEDS_BITSANDBYTES}")
    if train.fp16:
        raise UsageError("load_in_4bit was not tested with fp16; leave fp16 out, or use bf16")


def _resumption(words: list[str]) -> Resumption | None:
    wanted, artifact = last_value(words, "--resume_from_checkpoint"), last_value(words, "--wandb_checkpoint_artifact")
    if wanted and artifact:
        raise UsageError("--resume_from_checkpoint and --wandb_checkpoint_artifact cannot both be given")
    if artifact:
        into = fresh_folder(Path("artifacts"), artifact.rpartition("/")[2])
        wanted = from_first(lambda: str(download_checkpoint(artifact, into)))
    return find(wanted, last_value(words, "--output_dir")) if wanted else None


def new_output_dir(wanted: str) -> Path:
    """The run's folder: the wanted one, which must be new or empty, or for `new` one named by the time.

    Raises:
        UsageError: when the wanted folder already holds something.
    """
    if wanted == NEW_RUN:
        path = fresh_folder(Path("runs"), time.strftime("%Y%m%d-%H%M%S"))
    else:
        path = Path(wanted)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"output_dir {path} is not empty; choose a new one, so that no earlier run is overwritten")
    path.mkdir(parents=True, exist_ok=True)
    return path


def fresh_folder(parent: Path, name: str) -> Path:
    """`parent/name`, numbered where that is taken; not made."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    return next(
        path
        for path in (parent / (plain + end) for end in ["", *(f"-{n}" for n in range(2, 1000))])
        if not path.exists()
    )


def save_config(settings: dict[str, Any], path: Path) -> None:
    """Write what a run was resolved to, as a recipe that `--config` reads."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def settings_of(arguments: Arguments) -> dict[str, Any]:
    """What a run was resolved to, without `NOT_SETTINGS`."""
    return plain_settings((arguments.model, arguments.data), arguments.train, refusal_of)


def plain_settings(parts: Sequence[Any], train: TrainArguments, refusal: Refusal) -> dict[str, Any]:
    """Flags as plain values: ours in full; of the Trainer's what differs from its defaults or is shown by --help."""
    values: dict[str, Any] = {}
    for part in parts:
        offered = [item.name for item in fields(part) if not refusal(item.name) and item.name not in NOT_SETTINGS]
        values |= {name: getattr(part, name) for name in offered if getattr(part, name) != []}
    saved = train.to_dict()
    for item in fields(train):
        value = saved.get(item.name)
        if item.name in NOT_SETTINGS or not item.init or refusal(item.name) or value in (None, []):
            continue
        if item.name in SHOWN or value != getattr(TrainingArguments, item.name, None):
            values[item.name] = value
    return json.loads(json.dumps(values, default=str))
