"""What a training run prints: what it begins with, what came of it, and what to type next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dylo_moe.base.frozen import count_parameters
from dylo_moe.commands.train.arguments import Arguments
from dylo_moe.data.packing import PackedTexts, padding_share
from dylo_moe.evaluation.continuation import RoutedText
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.terminal import show_legend, show_losses, show_sample, show_shares
from dylo_moe.training.fit import command, go_on
from dylo_moe.training.metrics import MeterReading
from dylo_moe.training.run_folder import checkpoints_in
from dylo_moe.training.sharding import Sharding
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils import distributed
from dylo_moe.utils.atomic_files import write_json

# At its beginning.


def show_processes(console: Console, arguments: Arguments, sharding: Sharding | None) -> None:
    """How many train together, and GPUs of this machine that do not."""
    train, count = arguments.train, distributed.num_ranks()
    if count > 1:
        each, turns = train.per_device_train_batch_size, train.gradient_accumulation_steps
        how = "each with all of the base" if sharding is None else "each with a share of the base (FSDP2)"
        console.print(f"{count} processes, {how}: {count} x {turns} x {each} rows a step", highlight=False)
    idle = torch.cuda.device_count() - 1
    if count == 1 and idle > 0 and train.device.type == "cuda":
        console.print(f"one process trains on one GPU; {idle} more are idle here (docs/distributed.md)", style="yellow")


def show_resumption(console: Console, arguments: Arguments) -> None:
    """What the run goes on from, and what is not as it was."""
    resumed = arguments.resumed
    if resumed is None:
        return
    for problem in resumed.broken:
        console.print(Text(f"passed over: {problem}", style="yellow"), soft_wrap=True)
    if resumed.checkpoint is None:
        text = f"{resumed.run} was interrupted before its first checkpoint: it starts at its beginning."
        console.print(Text(text, style="yellow"), soft_wrap=True)
        return
    console.print(f"going on from {resumed.checkpoint}, step {resumed.record['step']}", highlight=False, soft_wrap=True)
    for change in arguments.changed:
        console.print(f"changed, as it may: {change}", highlight=False, soft_wrap=True)


def show_packing(console: Console, rows: Any, *, batch_size: int) -> None:
    """How full packed rows are, against the same texts a row each."""
    if isinstance(rows, PackedTexts):
        padding = padding_share(rows.lengths, batch_size)
        console.print(
            f"packing: {len(rows.lengths):,} texts in {len(rows):,} rows of {rows.max_seq_length} tokens, "
            f"{rows.fill:.1%} full; a row each, {padding:.1%} of a batch of {batch_size} would be padding",
            highlight=False,
        )


def show_model(console: Console, model: DyLoRAMoE) -> None:
    """What is frozen and what trains, counted from the model itself."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = count_parameters(parameter for parameter in model.parameters() if not parameter.requires_grad)
    expert = model.experts[0]
    router = sum(parameter.numel() for parameter in model.router.parameters())
    console.print(
        f"{model.base_id}: {frozen:,} parameters frozen, {trainable:,} trained: {len(model.experts)} experts of rank "
        f"{expert.rank} with {expert.parameters:,} each, a router of {router:,}",
        highlight=False,
    )


# At its end.


def show_best(console: Console, trainer: DyLoRATrainer) -> None:
    """Which checkpoint was the best, and which one the run ends with."""
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


def finish(
    console: Console,
    model: DyLoRAMoE,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[RoutedText],
    before: dict[str, float],
    after: dict[str, MeterReading],
    folder: Path,
    plots: list[Path],
) -> None:
    """Tables, samples, where things lie, and what to type next. Also kept as a picture, result.svg."""
    write_json(folder / "samples.json", [readable(item, tokenizer) for item in samples])
    recorder = Console(record=True, width=100, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for target in (console, recorder):
        show_losses(target, before, after)
        show_shares(target, after)
        show_legend(target, model.router.names)
        for item in samples:
            show_sample(target, item, tokenizer, model.router.names)
    recorder.save_svg(str(folder / "result.svg"), title="dylora train")
    recorder.file.close()
    checkpoint = folder / "checkpoint"
    console.rule(style="dim")
    for label, path in (
        ("checkpoint", checkpoint),
        ("metrics", folder / "metrics.jsonl"),
        *(("plot", plot) for plot in plots),
        ("picture", folder / "result.svg"),
        ("settings", folder / "config.yaml"),
    ):
        console.print(f"{label:11s} {path}", highlight=False, soft_wrap=True)
    console.print("\nNext, ask it something:\n")
    question = "Write the Python function `clamp`. Limit a number to a range."
    console.print(
        f"  {command()} generate --checkpoint {checkpoint} --prompt {question!r}".replace("`", ""),
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    console.print()


def readable(item: RoutedText, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A sample as it is kept in samples.json: the text of each token, and its expert."""
    tokens = [str(tokenizer.decode([token])) for token in item.ids]
    return {"domain": item.domain, "prompt_length": item.prompt_length, "tokens": tokens, "experts": item.experts}


# What to type next.


def how_to_go_on(arguments: Arguments) -> str:
    """Where a run stands that lost one of its processes."""
    folder = Path(arguments.train.output_dir)
    found = checkpoints_in(folder)
    if not found:
        return f"another process of this run has gone; {folder} has no checkpoint yet: start again"
    return f"another process of this run has gone; the last whole checkpoint is {found[-1][1]}. {go_on(folder)}"
