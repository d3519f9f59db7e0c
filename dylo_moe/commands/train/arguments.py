"""The flags of `dylora train`: ours, and the Trainer's under the Trainer's names."""

from __future__ import annotations

from dylo_moe.data.config import DataConfig
from dylo_moe.experts.config import ExpertConfig
from dylo_moe.parsing.command_line import CommandLine, refusal_of
from dylo_moe.routing.config import RouterConfig
from dylo_moe.training.arguments import ModelArguments, TrainerOptions

TRAIN_CONFIGS = (ModelArguments, ExpertConfig, RouterConfig, DataConfig)
"""The classes of our own flags; the Trainer's are in `TrainArguments`."""

TRAIN_LINE = CommandLine(
    prog="dylora train",
    kinds=TRAIN_CONFIGS,
    usage="dylora train [--config RECIPE] [--FLAG VALUE ...]",
    description="Train several LoRA experts and their router together on one frozen model.",
    refusal=refusal_of,
    trainer=TrainerOptions,
    examples=(
        "dylora train --config quickstart",
        "dylora train --datasets code_alpaca mbpp --num_experts 4 --output_dir runs/code",
        "dylora train --resume_from_checkpoint runs/code",
    ),
)
