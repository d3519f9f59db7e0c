"""The flags of `dylora eval`, which are typed after the checkpoint."""

from __future__ import annotations

from dylo_moe.evaluation.arguments import EvalArguments
from dylo_moe.parsing.command_line import CommandLine

EVAL_LINE = CommandLine(
    prog="dylora eval",
    kinds=(EvalArguments,),
    usage="dylora eval CHECKPOINT [--FLAG VALUE ...]",
    description="Held-out losses with intervals, and pass@k of HumanEval and MBPP, of a trained model. Run again with "
    "the same flags, it resumes where it was.",
    examples=(
        "dylora eval runs/code/checkpoint",
        "dylora eval runs/code/checkpoint --tasks humaneval,mbpp --allow_code_execution",
    ),
)
