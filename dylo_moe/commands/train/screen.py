"""What a training run prints: what it begins with, its results, and what to type next."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dylo_moe.base.frozen import count_parameters
from dylo_moe.commands.train.request import Arguments
from dylo_moe.data.packing import PackedTexts, padding_share
from dylo_moe.evaluation.continuation import RoutedText
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.terminal import show_device, show_legend, show_losses, show_sample, show_shares
from dylo_moe.training.fit import command, how_to_resume
from dylo_moe.training.metrics import MeterReading
from dylo_moe.training.run_folder import checkpoints_in
from dylo_moe.training.sharding import Sharding
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils import distributed
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.file_names import RESULT
from dylo_moe.utils.harmless_console import HarmlessConsole
from dylo_moe.utils.screen import Screen
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


def show_begin(screen: Screen, arguments: Arguments, sharding: Sharding | None) -> None:
    """Print how many processes train, and what a resumed run resumes from."""
    show_device(screen, arguments.train)
    _show_processes(screen, arguments, sharding)
    _show_resumption(screen, arguments)


def _show_processes(screen: Screen, arguments: Arguments, sharding: Sharding | None) -> None:
    """Print how many processes train together, and how many GPUs of this machine are idle."""
    train, count = arguments.train, distributed.num_ranks()
    if count > 1:
        each, turns = train.per_device_train_batch_size, train.gradient_accumulation_steps
        how = "each with all of the base" if sharding is None else "each with a share of the base (FSDP2)"
        screen.say(f"{count} processes, {how}: {count} x {turns} x {each} rows a step")
    idle = torch.cuda.device_count() - 1
    if count == 1 and idle > 0 and train.device.type == "cuda":
        verb = "is" if idle == 1 else "are"
        screen.warn(
            f"one process trains on one GPU; {counted(idle, 'other GPU')} of this machine {verb} idle "
            "(docs/distributed.md)"
        )


def _show_resumption(screen: Screen, arguments: Arguments) -> None:
    resumed = arguments.resumed
    if resumed is None:
        return
    for problem in resumed.broken:
        screen.warn(f"passed over: {problem}")
    if resumed.checkpoint is None:
        text = f"{resumed.run} was interrupted before its first checkpoint: it starts from the beginning."
        screen.warn(text)
        return
    screen.say(f"resuming from {resumed.checkpoint}, step {resumed.record['step']}")
    for change in arguments.changed:
        screen.say(f"changed, which is allowed: {change}")


def show_packing(screen: Screen, rows: Any, *, batch_size: int) -> None:
    """Print how full packed rows are, compared with one text in each row."""
    if isinstance(rows, PackedTexts):
        padding = padding_share(rows.lengths, batch_size)
        screen.say(
            f"packing: {counted(len(rows.lengths), 'text')} in {counted(len(rows), 'row')} of {rows.max_seq_length} "
            f"tokens, {rows.fill:.1%} full; with one text a row, {padding:.1%} of a batch of {batch_size} would be "
            "padding"
        )


def show_batch(screen: Screen, rows: Any, arguments: Arguments) -> None:
    """Print that a step wants more rows than an epoch has, where it does."""
    train = arguments.train
    wanted = train.per_device_train_batch_size * train.gradient_accumulation_steps * distributed.num_ranks()
    if len(rows) < wanted:
        screen.warn(
            f"an optimizer step takes {counted(wanted, 'row')}, and an epoch has {len(rows):,}: each epoch is one step",
        )


def show_model(screen: Screen, model: DyLoRAMoE) -> None:
    """Print how many parameters are frozen and how many are trained, counted from the model itself."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = count_parameters(parameter for parameter in model.parameters() if not parameter.requires_grad)
    expert = model.experts[0]
    router = sum(parameter.numel() for parameter in model.router.parameters())
    each = f"{expert.parameters:,} parameters" + (" each" if len(model.experts) > 1 else "")
    shared = model.experts.shared
    if shared is not None:
        each += f", a shared one of rank {shared.rank} with {shared.parameters:,}"
    screen.say(
        f"{model.base_id}: {frozen:,} parameters frozen, {trainable:,} trained: "
        f"{counted(len(model.experts), 'expert')} of rank {expert.rank} with {each}, a router of {router:,}",
    )
    if model.left_out is not None:
        screen.say(f"No expert adapts {model.left_out}.")


# The end.


def show_end(
    screen: Screen,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    trainer: DyLoRATrainer,
    results: Results,
    *,
    seconds: float,
) -> None:
    """Print the best checkpoint, tables and samples, the files of the run, and what to type next."""
    _show_best(screen, trainer)
    _show_results(screen, folder, tokenizer, trainer.own_model(), results)
    _show_files(screen, folder, results.plots)
    _show_next(screen, folder / RESULT)
    screen.say(f"The whole run took {seconds:.0f} s.")


def _show_best(screen: Screen, trainer: DyLoRATrainer) -> None:
    state = trainer.state
    if state.best_metric is None:
        return
    kept = f"kept as {state.best_model_checkpoint}" if state.best_model_checkpoint else "not saved"
    ends = "the run ends with it" if trainer.args.load_best_model_at_end else "the run ends with the last one"
    screen.say(
        f"best eval_{trainer.args.metric_for_best_model} {state.best_metric:.4f} at step {state.best_global_step}, "
        f"{kept}; {ends} (step {state.global_step})",
    )


def _show_results(
    screen: Screen, folder: Path, tokenizer: PreTrainedTokenizerBase, model: DyLoRAMoE, results: Results
) -> None:
    """Print losses, routing and samples, and save them as samples.json and as a picture, result.svg."""
    write_json(folder / "samples.json", [readable(item, tokenizer) for item in results.samples])
    picture = HarmlessConsole(record=True, width=100, file=io.StringIO(), force_terminal=True)
    for target in (screen, Screen("train", console=picture, is_answer=True, is_logged=False)):
        show_losses(target, results.before, results.after)
        show_shares(target, results.after)
        show_legend(target, model.router.names)
        for item in results.samples:
            show_sample(target, item, tokenizer, model.router.names)
    picture.save_svg(str(folder / "result.svg"), title="dylora train")


def readable(item: RoutedText, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write a sample as JSON values for samples.json: the text of each token, and the expert that it was routed to;
    where routing is decided once for each answer, also its answers."""
    tokens = [str(tokenizer.decode([token])) for token in item.ids]
    turns = {} if item.turns is None else {"turns": [turn._asdict() for turn in item.turns]}
    known = {"domain": item.domain, "prompt_length": item.prompt_length}
    return {**known, "tokens": tokens, "experts": item.experts, **turns}


def _show_files(screen: Screen, folder: Path, plots: list[Path]) -> None:
    screen.rule()
    screen.result("checkpoint", folder / RESULT)
    for label, path in (
        ("metrics", folder / "metrics.jsonl"),
        *(("plot", plot) for plot in plots),
        ("picture", folder / "result.svg"),
        ("settings", folder / "config.yaml"),
    ):
        screen.file(label, path)


# What to type next.


def _show_next(screen: Screen, checkpoint: Path) -> None:
    screen.say("\nNext, ask the model something:\n")
    screen.copyable(f"  {command()} generate --checkpoint {checkpoint} --prompt {QUESTION!r}\n")


def lost_process(arguments: Arguments) -> str:
    """The message of a run that ends because one of its processes is gone: how to resume it."""
    folder = Path(arguments.train.output_dir)
    found = checkpoints_in(folder)
    if not found:
        return f"another process of this run has gone; {folder} has no checkpoint yet: start the run again"
    return f"another process of this run has gone; the last whole checkpoint is {found[-1][1]}. {how_to_resume(folder)}"
