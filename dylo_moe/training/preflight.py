"""What can be known of a training before data or weights are read: everything that flags, packages, folders and the
config of the base decide. All problems come in one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.integrations import integration_utils
from transformers.optimization import get_scheduler

from dylo_moe.base.limits import BaseLimits, limits_of
from dylo_moe.base.loading import load_base_without_weights
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.data.config import ALL, DataConfig
from dylo_moe.data.loading import LoadedData
from dylo_moe.data.sources.locate import locate_for_training
from dylo_moe.experts.config import ExpertConfig
from dylo_moe.routing.config import RouterConfig
from dylo_moe.training.arguments import ModelArguments
from dylo_moe.training.build import build_model
from dylo_moe.training.run_folder import output_dir_problem
from dylo_moe.training.tracking import tracking_problem
from dylo_moe.training.trainer_arguments import TrainArguments, text_of
from dylo_moe.utils.errors import UsageError
from dylo_moe.utils.failures import is_out_of_memory
from dylo_moe.utils.host_memory import host_bytes
from dylo_moe.utils.install import EXTRAS, how_to_install
from dylo_moe.utils.screen import Screen

OTHER_PACKAGES = {
    "azure_ml": ("azureml", "azureml-core"),
    "comet_ml": ("comet", "comet-ml"),
    "flyte": ("flyte", "flytekit"),
}
"""Trackers that are not called as their modules and their packages are: the name of each."""

Configs = tuple[ModelArguments, ExpertConfig, RouterConfig, DataConfig, TrainArguments]
"""The configs of a training, as its flags are read into them."""

TRAINED_BYTES = 16
"""Bytes of a trained parameter: itself, its gradient and AdamW's two states, in fp32."""


def check_before_reading(
    model: ModelArguments,
    experts: ExpertConfig,
    router: RouterConfig,
    data: DataConfig,
    train: TrainArguments,
    *,
    is_new: bool,
    growth: GrowthConfig | None = None,
) -> BaseLimits:
    """Check a training before anything of it is read or written.

    Args:
        is_new: whether the run gets a new folder.
        growth: of a pool that begins empty and grows.

    Returns:
        What the base can read, by which the rows are to be checked before its weights are read.

    Raises:
        UsageError: with all problems.
    """
    problems = [*flag_problems(experts, router, train, grows=growth is not None), *_package_problems(train)]
    if is_new and (problem := output_dir_problem(train.output_dir)):
        problems.append(problem)
    try:
        names = [place.name for place in locate_for_training(data)]
    except ValueError as error:
        problems.append(str(error))
    else:
        problems += _metric_problems(train, names)
    try:
        limits = _limits(model, experts, router, growth)
    except (ValueError, ImportError) as error:
        raise UsageError("; ".join([*problems, str(error)])) from error
    if router.per_response and data.loss_on == ALL:
        problems.append(
            "loss_on is 'all', which has no meaning with granularity 'response', where the base reads the prompts and "
            "nothing learns them; leave it out"
        )
    if problem := limits.length_problem(data.max_seq_length, "--max_seq_length"):
        problems.append(problem)
    if problems:
        raise UsageError("; ".join(problems))
    return limits


def check_rows(
    limits: BaseLimits, data: LoadedData, tokenizer: PreTrainedTokenizerBase, screen: Screen, *, max_seq_length: int
) -> None:
    """Check the rows against what the base can read, before its weights are read.

    Raises:
        UsageError: for rows with a token that the base has no embedding for.
    """
    if note := limits.length_note(max_seq_length, "--max_seq_length"):
        screen.note(note)
    ids = {f"the dataset {name}": _highest(rows) for name, rows in data.evaluation.items()}
    ids["the tokenizer's padding"] = tokenizer.pad_token_id or 0
    problems = [problem for what, highest in ids.items() if (problem := limits.token_problem([highest], what))]
    if problems:
        raise UsageError("; ".join(problems))


def _highest(rows: Dataset) -> int:
    """The highest token id of a dataset, of which `rows` are a selection."""
    return pc.max(pc.list_flatten(rows.data.column("input_ids"))).as_py() or 0


def flag_problems(
    experts: ExpertConfig, router: RouterConfig, train: TrainArguments, *, grows: bool = False
) -> list[str]:
    """What flags say by themselves, on whatever machine the training will be: words that do not fit each other.

    Args:
        grows: whether the pool begins empty and grows.
    """
    problems = []
    if not grows and router.top_k > experts.num_experts:
        problems.append(f"top_k is {router.top_k}, but num_experts is {experts.num_experts}")
    try:
        get_scheduler(
            train.lr_scheduler_type,
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=train.learning_rate),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=train.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
    except (ValueError, TypeError) as error:
        given = f" with lr_scheduler_kwargs {train.lr_scheduler_kwargs}" if train.lr_scheduler_kwargs else ""
        name = text_of(train.lr_scheduler_type)
        problems.append(f"lr_scheduler_type {name}{given} cannot be used: {str(error).strip()}")
    return problems


def _package_problems(train: TrainArguments) -> Iterator[str]:
    """Trackers and optimizers whose packages are not installed, and a tracker that has no key."""
    for name in train.report_to or ():
        if name == "wandb":
            if problem := tracking_problem():
                yield problem
            continue
        module, package = OTHER_PACKAGES.get(name, (name, name))
        is_available = getattr(integration_utils, f"is_{module}_available", None)
        if is_available is not None and not is_available():
            how = how_to_install(name) if name in EXTRAS else f"pip install {package}"
            yield f"report_to is {name}, whose package is not installed: {how}"
    try:
        Trainer.get_optimizer_cls_and_kwargs(train)
    except (ImportError, ValueError, TypeError) as error:
        if "model" not in str(error):  # some optimizers need the model, and are made with it
            yield f"optim {text_of(train.optim)} cannot be used: {str(error).strip()}"


def _metric_problems(train: TrainArguments, datasets: Sequence[str]) -> list[str]:
    """A metric of the best checkpoint that no evaluation measures: of each dataset there are several, of all one."""
    metric = (train.metric_for_best_model or "loss").removeprefix("eval_")
    measured = [f"{name}_{what}" for name in datasets for what in ("loss", "token_entropy", "average_entropy")]
    if metric in ("loss", *measured) or any(metric.startswith(f"{name}_share_") for name in datasets):
        return []
    known = ", ".join(f"{name}_loss" for name in datasets)
    return [f"metric_for_best_model is {train.metric_for_best_model!r}; it must be loss, or that of a dataset: {known}"]


def _limits(
    model: ModelArguments, experts: ExpertConfig, router: RouterConfig, growth: GrowthConfig | None
) -> BaseLimits:
    """Make the pool on the base without weights, of which only the config is read; raises what does not fit it."""
    try:
        outline = build_model(
            replace(model, load_in_4bit=False),
            replace(experts, num_experts=1),
            router if growth is not None else replace(router, top_k=1),
            bf16=False,
            growth=growth,
            load=load_base_without_weights,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        of_shared = f" and shared_r {experts.shared_r:,}" if experts.shared_r else ""
        what = "these experts do" if of_shared else "one expert of that rank does"
        raise UsageError(
            f"lora_r is {experts.lora_r:,}{of_shared}: {what} not fit into this machine's memory"
        ) from error
    if growth is None:
        shared = 0 if outline.experts.shared is None else outline.experts.shared.parameters
        needed = (experts.num_experts * outline.experts[0].parameters + shared) * TRAINED_BYTES
        memory, of_shared = memory_bytes(), f" and shared_r {experts.shared_r:,}" if shared else ""
        if 0 < memory < needed:
            raise UsageError(
                f"num_experts is {experts.num_experts:,} and lora_r {experts.lora_r:,}{of_shared}: they take "
                f"{needed / 1e9:,.0f} GB while they train, and this machine has {memory / 1e9:,.0f} GB"
            )
    return limits_of(outline.base)


def memory_bytes() -> int:
    """The memory of this machine's CPU and GPUs together; 0 where the system does not say."""
    gpus = range(torch.cuda.device_count())
    return host_bytes() + sum(torch.cuda.get_device_properties(index).total_memory for index in gpus)
