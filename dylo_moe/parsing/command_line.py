"""The flags of a command, declared once for its parser and for its help; this module imports next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dylo_moe.parsing.help_format import Formatter, epilog

SHOWN_FLAGS = (  # noqa: SIM905
    "output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm bf16 fp16 "
    "lr_scheduler_kwargs label_smoothing_factor gradient_checkpointing logging_steps eval_strategy eval_steps "
    "save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model early_stopping_patience "
    "early_stopping_threshold eval_benchmark eval_benchmark_steps allow_code_execution sandbox resume_from_checkpoint "
    "wandb_checkpoint_artifact report_to run_name seed"
).split()
"""The Trainer's flags that --help shows; all others of the Trainer work too."""

TRAINER_EPILOG = (
    "Every other flag of transformers.TrainingArguments works too, under its own name: --help_all lists them. A recipe "
    "is a YAML file of `flag: value` lines, or the name of one that comes with dylora, such as quickstart; flags on "
    "the command line win over it."
)

REFUSED = {
    "save_only_model": "training could not resume from it; the run's final folder, checkpoint, holds the model alone",
    "ignore_data_skip": "training would not resume at the row where it was",
    "enable_jit_checkpoint": "SIGTERM always saves, at the end of the running step",
    "restore_callback_states_from_checkpoint": "what must be restored always is",
    "neftune_noise_alpha": "noise on the embeddings would change what the router reads",
    "torch_compile": "not tested with routing yet",
    "torch_compile_backend": "not tested with routing yet",
    "torch_compile_mode": "not tested with routing yet",
    "deepspeed": "not tested with routing yet",
    "parallelism_config": "not tested with routing yet",
    "ddp_find_unused_parameters": "experts that no token chose have no gradient, so this must stay on",
    "ddp_static_graph": "which experts take part differs from step to step",
    "average_tokens_across_devices": "a step's loss is always the mean over the tokens of all processes",
    "dataloader_drop_last": "rows would be left out; the last batch of a pass is smaller instead",
    "auto_find_batch_size": "it would restart on experts that were already trained",
    "push_to_hub": "upload the checkpoint folder with the `hf` command instead",
    "do_train": "this command always trains",
    "do_eval": "this command evaluates before and after training, and as eval_strategy says",
    "do_predict": "this command does not predict",
    "remove_unused_columns": "the batches hold only what training needs",
    "prediction_loss_only": "evaluation is by loss",
    "label_names": "the batches' labels are called labels",
    "include_for_metrics": "evaluation is by loss",
    "batch_eval_metrics": "evaluation is by loss",
    "eval_on_start": "this command always evaluates before training",
    "disable_tqdm": "this command has its own progress bar",
    "config": "give --config once, on the command line",
}
"""The Trainer's flags that would have no effect or a wrong one here, each with the reason why it is not offered."""

REFUSED_PREFIXES = ("hub_", "trackio_")

Refusal = Callable[[str], str | None]
"""A function that says why a flag of a given name is not offered; it returns None where the flag is offered."""


def refusal_of(name: str) -> str | None:
    """Say why `dylora train` does not offer a flag; None where it offers the flag."""
    if name.startswith(REFUSED_PREFIXES):
        return "this command has no such destination"
    return REFUSED.get(name)


def refuses_nothing(name: str) -> str | None:
    """Refuse no flag: the refusal of commands that offer every flag that they have."""
    return None


class CommandLine(NamedTuple):
    """The flags of a command, and how its help presents them."""

    prog: str
    """How the command is typed."""
    kinds: tuple[type, ...]
    """The dataclasses of our flags, in the order in which the help shows them."""
    description: str
    usage: str
    examples: tuple[str, ...]
    """Whole command lines, which the help ends with."""
    refusal: Refusal = refuses_nothing
    """Says which of the flags are not offered, and why."""
    trainer: type | None = None
    """The class that declares our defaults of the Trainer's flags; None where the command has no flags of the
    Trainer."""

    @property
    def layout(self) -> dict[str, Any]:
        """The keyword arguments of `argparse.ArgumentParser`."""
        return {
            "prog": self.prog,
            "usage": self.usage,
            "description": self.description,
            "epilog": epilog(self.examples, *([] if self.trainer is None else [TRAINER_EPILOG])),
            "allow_abbrev": False,
            "add_help": False,
            "formatter_class": Formatter,
        }
