"""What a training run prints: what it begins with, its results, and what to type next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dylo_moe.base.frozen import count_parameters
from dylo_moe.commands.train.request import Arguments
from dylo_moe.data.packing import PackedTexts, padding_share
from dylo_moe.evaluation.continuation import RoutedText
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.terminal import show_legend, show_losses, show_sample, show_shares
from dylo_moe.training.fit import command, how_to_resume
from dylo_moe.training.metrics import MeterReading
from dylo_moe.training.run_folder import checkpoints_in
from dylo_moe.training.sharding import Sharding
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils import distributed
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.words import counted

QUESTION = "Write the Python function clamp. Limit a number to a range."


class Results(NamedTuple):
    """The results of a run: losses, readings, generated texts and plots."""

    before: dict[str, float]
    """The held-out loss of each dataset before training."""
    after: dict[str, MeterReading]
    """The held-out reading of each dataset after training."""
    samples: list[RoutedText]
    plots: list[Path]


# The beginning.


def show_begin(console: Console, arguments: Arguments, sharding: Sharding | None) -> None:
    """Print how many processes train, and what a resumed run resumes from."""
    _show_processes(console, arguments, sharding)
    _show_resumption(console, arguments)


def _show_processes(console: Console, arguments: Arguments, sharding: Sharding | None) -> None:
    """Print how many processes train together, and how many GPUs of this machine are idle."""
    train, count = arguments.train, distributed.num_ranks()
    if count > 1:
        each, turns = train.per_device_train_batch_size, train.gradient_accumulation_steps
        how = "each with all of the base" if sharding is None else "each with a share of the base (FSDP2)"
        console.print(f"{count} processes, {how}: {count} x {turns} x {each} rows a step", highlight=False)
    idle = torch.cuda.device_count() - 1
    if count == 1 and idle > 0 and train.device.type == "cuda":
        verb = "is" if idle == 1 else "are"
        console.print(
            f"one process trains on one GPU; {counted(idle, 'other GPU')} of this machine {verb} idle "
            "(docs/distributed.md)",
            style="yellow",
        )


def _show_resumption(console: Console, arguments: Arguments) -> None:
    resumed = arguments.resumed
    if resumed is None:
        return
    for problem in resumed.broken:
        console.print(Text(f"passed over: {problem}", style="yellow"), soft_wrap=True)
    if resumed.checkpoint is None:
        text = f"{resumed.run} was interrupted before its first checkpoint: it starts from the beginning."
        console.print(Text(text, style="yellow"), soft_wrap=True)
        return
    console.print(f"resuming from {resumed.checkpoint}, step {resumed.record['step']}", highlight=False, soft_wrap=True)
    for change in arguments.changed:
        console.print(f"changed, which is allowed: {change}", highlight=False, soft_wrap=True)


def show_packing(console: Console, rows: Any, *, batch_size: int) -> None:
    """Print how full packed rows are, compared with one text in each row."""
    if isinstance(rows, PackedTexts):
        padding = padding_share(rows.lengths, batch_size)
        console.print(
            f"packing: {counted(len(rows.lengths), 'text')} in {counted(len(rows), 'row')} of {rows.max_seq_length} "
            f"tokens, {rows.fill:.1%} full; with one text a row, {padding:.1%} of a batch of {batch_size} would be "
            "padding",
            highlight=False,
        )


def show_model(console: Console, model: DyLoRAMoE) -> None:
    """Print how many parameters are frozen and how many are trained, counted from the model itself."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = count_parameters(parameter for parameter in model.parameters() if not parameter.requires_grad)
    expert = model.experts[0]
    router = sum(parameter.numel() for parameter in model.router.parameters())
    each = f"{expert.parameters:,} parameters" + (" each" if len(model.experts) > 1 else "")
    console.print(
        f"{model.base_id}: {frozen:,} parameters frozen, {trainable:,} trained: "
        f"{counted(len(model.experts), 'expert')} of rank {expert.rank} with {each}, a router of {router:,}",
        highlight=False,
    )


# The end.


def show_end(
    console: Console,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    trainer: DyLoRATrainer,
    results: Results,
    *,
    seconds: float,
) -> None:
    """Print the best checkpoint, tables and samples, the files of the run, and what to type next."""
    _show_best(console, trainer)
    _show_results(console, folder, tokenizer, trainer.own_model(), results)
    _show_files(console, folder, results.plots)
    _show_next(console, folder / "checkpoint")
    console.print(f"The whole run took {seconds:.0f} s.", highlight=False)


def _show_best(console: Console, trainer: DyLoRATrainer) -> None:
    state = trainer.state
    if state.best_metric is None:
        return
    kept = f"kept as {state.best_model_checkpoint}" if state.best_model_checkpoint else "not saved"
    ends = "the run ends with it" if trainer.args.load_best_model_at_end else "the run ends with the last one"
    console.print(
        f"best eval_{trainer.args.metric_for_best_model} {state.best_metric:.4f} at step {state.best_global_step}, "
        f"{kept}; {ends} (step {state.global_step})",
        highlight=False,
        soft_wrap=True,
    )


def _show_results(
    console: Console, folder: Path, tokenizer: PreTrainedTokenizerBase, model: DyLoRAMoE, results: Results
) -> None:
    """Print losses, routing and samples, and save them as samples.json and as a picture, result.svg."""
    write_json(folder / "samples.json", [readable(item, tokenizer) for item in results.samples])
    recorder = Console(record=True, width=100, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for target in (console, recorder):
        show_losses(target, results.before, results.after)
        show_shares(target, results.after)
        show_legend(target, model.router.names)
        for item in results.samples:
            show_sample(target, item, tokenizer, model.router.names)
    recorder.save_svg(str(folder / "result.svg"), title="dylora train")
    recorder.file.close()


def readable(item: RoutedText, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write a sample as JSON values for samples.json: the text of each token, and the expert that it was routed to."""
    tokens = [str(tokenizer.decode([token])) for token in item.ids]
    return {"domain": item.domain, "prompt_length": item.prompt_length, "tokens": tokens, "experts": item.experts}


def _show_files(console: Console, folder: Path, plots: list[Path]) -> None:
    console.rule(style="dim")
    for label, path in (
        ("checkpoint", folder / "checkpoint"),
        ("metrics", folder / "metrics.jsonl"),
        *(("plot", plot) for plot in plots),
        ("picture", folder / "result.svg"),
        ("settings", folder / "config.yaml"),
    ):
        console.print(f"{label:11s} {path}", highlight=False, soft_wrap=True)


# What to type next.


def _show_next(console: Console, checkpoint: Path) -> None:
    console.print("\nNext, ask the model something:\n")
    words = f"  {command()} generate --checkpoint {checkpoint} --prompt {QUESTION!r}\n"
    console.print(words, highlight=False, soft_wrap=True, markup=False)


def lost_process(arguments: Arguments) -> str:
    """The message of a run that ends because one of its processes is gone: how to resume it."""
    folder = Path(arguments.train.output_dir)
    found = checkpoints_in(folder)
    if not found:
        return f"another process of this run has gone; {folder} has no checkpoint yet: start the run again"
    return f"another process of this run has gone; the last whole checkpoint is {found[-1][1]}. {how_to_resume(folder)}"
