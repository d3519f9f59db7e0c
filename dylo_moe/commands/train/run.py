"""Joint training: several experts and their router, together, on several kinds of data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.train.arguments import Arguments, settings_of
from dylo_moe.commands.train.screen import (
    finish,
    how_to_go_on,
    show_best,
    show_model,
    show_packing,
    show_processes,
    show_resumption,
)
from dylo_moe.data.collator import Collator
from dylo_moe.data.loading import LoadedData, load_data
from dylo_moe.data.packing import check_texts_kept_apart, epoch_of
from dylo_moe.evaluation.callback import BenchmarkCallback, BenchmarkSchedule, plan_benchmarks
from dylo_moe.evaluation.continuation import RoutedText, end_ids, sample
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.model.saving import save_checkpoint
from dylo_moe.report.terminal import show_data, show_loss
from dylo_moe.training.build import build_model, start_router
from dylo_moe.training.callbacks import MetricsFile, ProgressBar
from dylo_moe.training.fit import evaluate, take_up_log, train_on
from dylo_moe.training.plots import write_plots
from dylo_moe.training.resume import check_same_data
from dylo_moe.training.run_folder import (
    CONFIG_FILE,
    checkpoints_in,
    clear_unfinished,
    new_output_dir,
    save_config,
    set_aside,
)
from dylo_moe.training.run_info import run_facts
from dylo_moe.training.sharding import shard_base, take_sharding
from dylo_moe.training.stopping import EarlyStopping, StopRequest
from dylo_moe.training.tracking import CheckpointArtifacts, log_plots, log_settings, prepare
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils import distributed
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.errors import RankLost

SAMPLE_TOKENS = 32


def train(arguments: Arguments) -> Path:
    """Train as the flags say and show the result; returns the folder of the final checkpoint.

    Raises:
        Stopped: when SIGTERM or SIGINT ended it; what was trained is saved, and the message says how to go on.
        RankLost: when another process of the run has gone.
    """
    with StopRequest() as stop:
        try:
            return _train(arguments, stop)
        except (RuntimeError, ValueError, OSError) as error:
            if distributed.num_ranks() > 1:
                stop.leave()
            if distributed.is_lost_peer(error):
                raise RankLost(how_to_go_on(arguments)) from error
            raise


def _train(arguments: Arguments, stop: StopRequest) -> Path:
    started = time.time()
    transformers_logging.disable_progress_bar()
    console = distributed.console()
    settings, sharding = settings_of(arguments), take_sharding(arguments.train, num_processes=distributed.num_ranks())
    show_processes(console, arguments, sharding)
    show_resumption(console, arguments)
    set_seed(arguments.train.seed)
    plan = benchmark_plan(arguments)
    if plan is not None and sharding is not None:
        raise ValueError(
            "eval_benchmark has one process answer, and with FSDP that holds a part of the base: leave one of them out"
        )
    tokenizer = load_tokenizer(arguments.model.model)
    with arguments.train.main_process_first(desc="tokenising"):
        data = load_data(arguments.data, tokenizer, seed=arguments.train.seed)
    show_data(console, data)
    check_same_data(arguments.resumed, data)
    train_rows = epoch_of(data.train, arguments.data)
    show_packing(console, train_rows, batch_size=arguments.train.per_device_train_batch_size)
    model = build_model(arguments.model, bf16=arguments.train.bf16)
    if arguments.data.packing:
        check_texts_kept_apart(model, model.base)
    show_model(console, model)
    show_loss(console, model, arguments.model.loss_chunk_size)
    folder = Path(distributed.from_first(lambda: str(run_folder(console, arguments, settings))))
    arguments.train.output_dir = str(folder)
    prepare(arguments.train, folder)
    log_settings(settings)
    collator = Collator(tokenizer)
    resumed = arguments.resumed
    checkpoint = resumed.checkpoint if resumed is not None else None
    if checkpoint is None and model.router_config.is_learned:
        start_router(model, data, collator, seed=arguments.train.seed)
    metrics = MetricsFile(folder / "metrics.jsonl")
    facts = {**run_facts(model, data), "processes": distributed.num_ranks()}
    training = {"settings": settings, "data": data.fingerprint, "facts": facts}
    if distributed.is_first():
        write_json(folder / "run.json", facts)
    if sharding is not None:
        shard_base(model, sharding, device=arguments.train.device)

    def tell(step: int, sentences: list[str]) -> None:
        if not distributed.is_first():
            return
        metrics.write(step, {"alarms": sentences})
        for sentence in sentences:
            console.print(Text(f"step {step}: {sentence}", style="yellow"), soft_wrap=True)

    train = arguments.train
    callbacks: list[TrainerCallback] = [metrics, ProgressBar(console), stop]
    if "wandb" in list(train.report_to or ()):
        callbacks.append(CheckpointArtifacts())
    if train.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(train.early_stopping_patience, train.early_stopping_threshold))
    trainer = DyLoRATrainer(
        model=model,
        args=train,
        train_dataset=train_rows,
        eval_dataset=data.evaluation,
        data_collator=collator,
        domains=data.names,
        training=training,
        tell=tell,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if plan is not None:
        trainer.add_callback(benchmark_callback(plan, trainer, tokenizer, folder, console))
    state = take_up_log(console, metrics, checkpoint)
    if checkpoint is None:
        before = {name: reading.loss for name, reading in evaluate(trainer, console, "before training").items()}
    else:
        before = arguments.resumed.record["losses_before"]  # type: ignore[union-attr]
    training["losses_before"] = before
    train_on(trainer, stop, checkpoint, state)
    final = folder / "checkpoint"
    record = {**training, "step": trainer.state.global_step, "epoch": trainer.state.epoch}
    model.router.collect_counts()
    if distributed.is_first():
        save_checkpoint(model, final, training=record)
    after = evaluate(trainer, console, "after training")
    samples = sample_of_each(model, tokenizer, data)
    if distributed.is_first():
        losses = {"before": before, "after": {name: reading.loss for name, reading in after.items()}}
        save_checkpoint(model, final, training=record, losses=losses)
        plots = write_plots(folder / "plots", folder / "metrics.jsonl", after)
        log_plots(plots)
        show_best(console, trainer)
        finish(console, model, tokenizer, samples, before, after, folder, plots)
        console.print(f"The whole run took {time.time() - started:.0f} s.", highlight=False)
    distributed.leave()
    return final


def run_folder(console: Console, arguments: Arguments, settings: dict[str, Any]) -> Path:
    """The folder of this run, with its settings in it: a new one, or that of the run which goes on.

    Raises:
        ValueError: for a folder that holds another run, or later checkpoints than the one to go on from.
    """
    resumed = arguments.resumed
    if resumed is not None and Path(arguments.train.output_dir).resolve() == resumed.run.resolve():
        folder = resumed.run
        if resumed.broken:
            for name in set_aside(folder, resumed.checkpoint):
                console.print(f"kept aside as {name}", highlight=False, style="yellow")
        newer = [path.name for _, path in checkpoints_in(folder)]
        if resumed.checkpoint is not None and newer[-1] != resumed.checkpoint.name:
            raise ValueError(
                f"{folder} holds {newer[-1]}, which is newer than {resumed.checkpoint.name}: go on from that, or "
                "give a new --output_dir to branch off"
            )
        for name in clear_unfinished(folder):
            console.print(f"removed {name}, which an interrupted save left", highlight=False)
    else:
        folder = new_output_dir(arguments.train.output_dir)
    save_config(settings, folder / CONFIG_FILE)
    return folder


def benchmark_plan(arguments: Arguments) -> BenchmarkSchedule | None:
    """What is judged while training; None: nothing. Raises ValueError where that cannot be."""
    train = arguments.train
    return plan_benchmarks(
        train.eval_benchmark,
        every=train.eval_benchmark_steps,
        allow_code_execution=train.allow_code_execution,
        sandbox=train.sandbox,
        data_dir=arguments.data.data_dir,
        seed=train.seed,
    )


def benchmark_callback(
    plan: BenchmarkSchedule, trainer: DyLoRATrainer, tokenizer: PreTrainedTokenizerBase, folder: Path, console: Console
) -> BenchmarkCallback:
    """Evaluation while training, which a signal leaves as it leaves one of losses."""
    return BenchmarkCallback(
        plan,
        tokenizer,
        folder,
        console=console,
        log=trainer.log,
        between=lambda: trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control),
        pause=trainer.pause,
    )


def sample_of_each(model: DyLoRAMoE, tokenizer: PreTrainedTokenizerBase, data: LoadedData) -> list[RoutedText]:
    """A text from each dataset's prompt; all ranks generate the same, for none has all of a sharded base."""
    model.eval()
    return [
        sample(model, ids, end_ids=end_ids(tokenizer), max_new_tokens=SAMPLE_TOKENS, label=domain)
        for domain, ids in data.sample_prompts.items()
    ]
