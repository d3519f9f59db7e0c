"""Joint training: several experts and their router, together, on several kinds of data."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from .arguments import Arguments, new_output_dir, save_config
from .base import load_base, load_tokenizer
from .config import RouterConfig, parse_router_layer
from .data import Collator, LoadedData, PackedTexts, check_texts_kept_apart, epoch_of, load_data, padding_share
from .generate import end_ids, sample
from .meter import Reading
from .model import DyLoRAMoE
from .progress import MetricsFile, ProgressBar
from .summary import show_data, show_legend, show_losses, show_sample, show_shares, write_plots
from .trainer import DyLoRATrainer

ROUTER_START_ROWS = 512
"""Training rows whose features start the gate."""
ROUTER_START_BATCH = 16
SAMPLE_TOKENS = 32


def build_model(arguments: Arguments) -> DyLoRAMoE:
    """The base with fresh experts and router, as the flags say; every problem of the flags is raised here."""
    flags = arguments.model
    router = RouterConfig(
        top_k=flags.top_k,
        router_layer=parse_router_layer(flags.router_layer),
        granularity=flags.granularity,
        router_half_life=flags.router_half_life,
        z_loss_coefficient=flags.z_loss_coefficient,
        entropy_coefficient=flags.entropy_coefficient,
    )
    if router.reads_final and not router.per_sequence:
        raise ValueError("router_layer final with granularity token cannot generate; add --granularity sequence")
    targets = flags.lora_targets
    lora = LoraConfig(
        r=flags.lora_r,
        lora_alpha=flags.lora_alpha,
        lora_dropout=flags.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    return DyLoRAMoE.from_base(
        load_base(flags.model, dtype=torch.bfloat16 if arguments.train.bf16 else "auto"),
        num_experts=flags.num_experts,
        lora=lora,
        router=router,
        balance_coefficient=flags.balance_coefficient,
    )


def run(arguments: Arguments) -> Path:
    """Train as the flags say and show the result; returns the folder of the final checkpoint."""
    started = time.time()
    transformers_logging.disable_progress_bar()
    console = Console()
    set_seed(arguments.train.seed)
    tokenizer = load_tokenizer(arguments.model.model)
    with arguments.train.main_process_first(desc="tokenising"):
        data = load_data(arguments.data, tokenizer, seed=arguments.train.seed)
    show_data(console, data)
    train_rows = epoch_of(data.train, arguments.data)
    show_packing(console, train_rows, batch_size=arguments.train.per_device_train_batch_size)
    model = build_model(arguments)
    if arguments.data.packing:
        check_texts_kept_apart(model, model.base)
    show_model(console, model)
    folder = new_output_dir(arguments.train.output_dir)
    arguments.train.output_dir = str(folder)
    save_config(arguments, folder / "config.yaml")
    collator = Collator(tokenizer)
    start_rows = min(ROUTER_START_ROWS, len(data.train))
    model.initialize_router(
        (
            collator([data.train[row] for row in range(start, min(start + ROUTER_START_BATCH, start_rows))])
            for start in range(0, start_rows, ROUTER_START_BATCH)
        ),
        seed=arguments.train.seed,
    )
    trainer = DyLoRATrainer(
        model=model,
        args=arguments.train,
        train_dataset=train_rows,
        eval_dataset=data.evaluation,
        data_collator=collator,
        domains=data.names,
        callbacks=[MetricsFile(folder / "metrics.jsonl"), ProgressBar(console)],
    )
    trainer.remove_callback(PrinterCallback)
    before = evaluate(trainer, console, "before training")
    trainer.train()
    after = evaluate(trainer, console, "after training")
    checkpoint = folder / "checkpoint"
    if trainer.is_world_process_zero():
        model.save_pretrained(str(checkpoint))
        plots = write_plots(folder / "plots", folder / "metrics.jsonl", after)
        finish(console, model, tokenizer, data, before, after, folder, plots)
        console.print(f"The whole run took {time.time() - started:.0f} s.", highlight=False)
    return checkpoint


def show_packing(console: Console, rows: Any, *, batch_size: int) -> None:
    """How full packed rows are, against the same texts a row each."""
    if isinstance(rows, PackedTexts):
        padding = padding_share(rows.lengths, batch_size)
        console.print(
            f"packing: {len(rows.lengths):,} texts in {len(rows):,} rows of {rows.max_seq_length} tokens, "
            f"{rows.fill:.1%} full; a row each, {padding:.1%} of a batch of {batch_size} would be padding",
            highlight=False,
        )


def evaluate(trainer: DyLoRATrainer, console: Console, when: str) -> dict[str, Reading]:
    """The held-out reading of every dataset."""
    with console.status(f"evaluating {when}"):
        trainer.evaluate()
    return dict(trainer.readings)


def show_model(console: Console, model: DyLoRAMoE) -> None:
    """What is frozen and what trains, counted from the model itself."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    expert = model.experts[0]
    router = sum(parameter.numel() for parameter in model.router.parameters())
    console.print(
        f"{model.base_id}: {frozen:,} parameters frozen, {trainable:,} trained: {len(model.experts)} experts of rank "
        f"{expert.rank} with {expert.parameters:,} each, a router of {router:,}",
        highlight=False,
    )


def finish(
    console: Console,
    model: DyLoRAMoE,
    tokenizer: PreTrainedTokenizerBase,
    data: LoadedData,
    before: dict[str, Reading],
    after: dict[str, Reading],
    folder: Path,
    plots: list[Path],
) -> None:
    """Tables, samples, where things lie, and what to type next. Also kept as a picture, result.svg."""
    model.eval()
    samples = [
        sample(model, ids, end_ids=end_ids(tokenizer), max_new_tokens=SAMPLE_TOKENS, label=domain)
        for domain, ids in data.sample_prompts.items()
    ]
    recorder = Console(record=True, width=100, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for target in (console, recorder):
        show_losses(target, before, after)
        show_shares(target, after)
        show_legend(target, model.experts.names)
        for item in samples:
            show_sample(target, item, tokenizer, model.experts.names)
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


def command() -> str:
    """How the reader can call this very installation: by name where that finds it, else by its path."""
    beside, found = Path(sys.executable).with_name("dylora"), shutil.which("dylora")
    if found and Path(found).resolve() == beside.resolve():
        return "dylora"
    return os.path.relpath(beside) if beside.exists() else f"{sys.executable} -m dylo_moe.cli"
