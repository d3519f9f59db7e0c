"""Joint training, the command `dylora train`: several experts and their router, together, on several datasets."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.train.request import Arguments, settings_of
from dylo_moe.commands.train.screen import (
    Results,
    lost_process,
    show_batch,
    show_begin,
    show_end,
    show_model,
    show_packing,
)
from dylo_moe.data.collator import Collator
from dylo_moe.data.loading import LoadedData, load_data
from dylo_moe.data.packing import check_texts_kept_apart, epoch_of
from dylo_moe.data.turn_rows import only_answers
from dylo_moe.data.turn_tokens import find_turn_tokens
from dylo_moe.evaluation.callback import BenchmarkCallback, BenchmarkSchedule, plan_benchmarks
from dylo_moe.evaluation.continuation import RoutedText, end_ids, sample
from dylo_moe.evaluation.results import rename_evaluations
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.model.saving import save_checkpoint
from dylo_moe.report.terminal import show_data, show_loss, show_routing
from dylo_moe.training.build import build_model, check_start, start_router
from dylo_moe.training.callbacks import MetricsFile, ProgressBar
from dylo_moe.training.finished import LOSSES_AFTER, keep_earlier_result, nothing_left
from dylo_moe.training.fit import command, evaluate, removed_unless_trained, resume_log, train_to_end
from dylo_moe.training.plots import write_plots
from dylo_moe.training.preflight import check_before_reading, check_rows
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
from dylo_moe.training.sharding import Sharding, shard_base, take_sharding
from dylo_moe.training.stopping import EarlyStopping, StopRequest
from dylo_moe.training.tracking import CheckpointArtifacts, log_plots, log_settings, prepare
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils import distributed
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.errors import RankLost, Stopped
from dylo_moe.utils.file_names import RESULT
from dylo_moe.utils.owner import Owner
from dylo_moe.utils.screen import Screen

SAMPLE_TOKENS = 32

TRAINING = "training"
"""What is done in a run's folder, for the message to a second process."""


class TrainingRun(NamedTuple):
    """What the steps of one training run work with."""

    arguments: Arguments
    screen: Screen
    tokenizer: PreTrainedTokenizerBase
    data: LoadedData
    model: DyLoRAMoE
    folder: Path
    metrics: MetricsFile
    record: dict[str, Any]
    """The manifest's record in every checkpoint: settings, the rows' fingerprint, facts, losses before training."""

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that the run resumes from; None where it starts at its beginning."""
        return None if self.arguments.resumed is None else self.arguments.resumed.checkpoint


def train(arguments: Arguments) -> Path:
    """Train as the flags say and show the result; returns the folder of the final checkpoint.

    Raises:
        Stopped: when SIGTERM or SIGINT ended it; what was trained is saved, and the message says how to resume.
        RankLost: when another process of the run has gone.
    """
    with StopRequest() as stop, Owner() as owner:
        try:
            return _train(arguments, stop, owner)
        except (RuntimeError, ValueError, OSError) as error:
            if distributed.num_ranks() > 1:
                stop.leave()
            if distributed.is_lost_peer(error):
                raise RankLost(lost_process(arguments)) from error
            raise


def _train(arguments: Arguments, stop: StopRequest, owner: Owner) -> Path:
    """Run a training from its flags to its final checkpoint."""
    started = time.time()
    transformers_logging.disable_progress_bar()
    screen = distributed.screen("train")
    settings = settings_of(arguments)
    if is_finished(arguments, settings, screen):
        distributed.leave()
        return Path(arguments.train.output_dir) / RESULT
    if not writes_new_folder(arguments):
        distributed.first_does(lambda: owner.take(Path(arguments.train.output_dir), TRAINING))
    sharding = take_sharding(arguments.train, num_processes=distributed.num_ranks())
    show_begin(screen, arguments, sharding)
    schedule = benchmark_schedule(arguments, sharding)
    limits = check_before_reading(*arguments.configs, is_new=writes_new_folder(arguments))
    set_seed(arguments.train.seed)
    tokenizer, data = read_data(arguments, screen)
    check_rows(limits, data, tokenizer, screen, max_seq_length=arguments.data.max_seq_length)
    rows = epoch_of(data.train, arguments.data)
    show_packing(screen, rows, batch_size=arguments.train.per_device_train_batch_size)
    show_batch(screen, rows, arguments)
    model = make_model(arguments, screen)
    if starts_gate(arguments, model):
        check_start(model, data)
    is_new = writes_new_folder(arguments)
    folder = open_folder(arguments, screen, owner)
    with removed_unless_trained(folder, is_new=is_new):
        run = open_run(arguments, settings, screen, tokenizer, data, model, folder)
        if sharding is not None:
            shard_base(model, sharding, device=arguments.train.device)
        trainer = make_trainer(run, rows, stop)
        if schedule is not None:
            trainer.add_callback(benchmark_callback(run, schedule, trainer, stop))
        state = resume_log(screen, run.metrics, run.checkpoint)
        run.record["losses_before"] = losses_before(run, trainer)
        train_to_end(trainer, stop, run.checkpoint, state)
        final = save_result(run, trainer, started)
    distributed.leave()
    return final


# Before training.


def is_finished(arguments: Arguments, settings: dict[str, Any], screen: Screen) -> bool:
    """Whether the resumed run has nothing left to train; then say so. Nothing has been written by now.

    Raises:
        CheckpointError: where the run is finished, and cannot be trained further as the flags ask.
    """
    sentence = nothing_left(arguments.resumed, arguments.train.output_dir, settings)
    if sentence is None:
        return False
    screen.say(sentence)
    screen.result("checkpoint", Path(arguments.train.output_dir) / RESULT)
    return True


def benchmark_schedule(arguments: Arguments, sharding: Sharding | None) -> BenchmarkSchedule | None:
    """Decide which benchmarks are run during training, and when; None where none is.

    Raises:
        ValueError: for a benchmark that cannot be run.
    """
    train = arguments.train
    schedule = plan_benchmarks(
        train.eval_benchmark,
        every=train.eval_benchmark_steps,
        allow_code_execution=train.allow_code_execution,
        sandbox=train.sandbox,
        data_dir=arguments.data.data_dir,
        seed=train.seed,
    )
    if schedule is not None and sharding is not None:
        raise ValueError(
            "eval_benchmark generates answers in one process, which with FSDP holds only a part of the base: leave one "
            "of them out"
        )
    return schedule


def read_data(arguments: Arguments, screen: Screen) -> tuple[PreTrainedTokenizerBase, LoadedData]:
    """Read the base's tokenizer and the datasets.

    Raises:
        ValueError: where the rows are not those that a resumed run was trained on.
    """
    tokenizer = load_tokenizer(arguments.model.model, accept_terms=arguments.model.accept_gemma_terms)
    with arguments.train.main_process_first(desc="tokenising"):
        data = load_data(arguments.data, tokenizer, seed=arguments.train.seed)
    if arguments.router.per_response:
        data = only_answers(data, find_turn_tokens(tokenizer))
    show_data(screen, data)
    check_same_data(arguments.resumed, data)
    return tokenizer, data


def make_model(arguments: Arguments, screen: Screen) -> DyLoRAMoE:
    """Load the base and give it new experts and a new router."""
    model = build_model(arguments.model, arguments.experts, arguments.router, bf16=arguments.train.bf16)
    if arguments.data.packing:
        check_texts_kept_apart(model, model.base)
    show_model(screen, model)
    show_routing(screen, model)
    show_loss(screen, model, arguments.model.loss_chunk_size)
    return model


def open_run(
    arguments: Arguments,
    settings: dict[str, Any],
    screen: Screen,
    tokenizer: PreTrainedTokenizerBase,
    data: LoadedData,
    model: DyLoRAMoE,
    folder: Path,
) -> TrainingRun:
    """Write the settings into the run's folder, start its tracker, and start the gate of a run that is not resumed."""
    if distributed.is_first():
        save_config(settings, folder / CONFIG_FILE)
    prepare(arguments.train, folder)
    log_settings(settings)
    if starts_gate(arguments, model):
        start_router(model, data, Collator(tokenizer), seed=arguments.train.seed)
    facts = {**run_facts(model, data), "processes": distributed.num_ranks()}
    if distributed.is_first():
        write_json(folder / "run.json", facts)
    record = {"settings": settings, "data": data.fingerprint, "facts": facts}
    return TrainingRun(arguments, screen, tokenizer, data, model, folder, MetricsFile(folder / "metrics.jsonl"), record)


def starts_gate(arguments: Arguments, model: DyLoRAMoE) -> bool:
    """Whether the run begins with the start of its gate."""
    return model.router_config.is_learned and (arguments.resumed is None or arguments.resumed.checkpoint is None)


def writes_new_folder(arguments: Arguments) -> bool:
    """Whether the run gets a folder of its own: it is new, or a branch of the run that it resumes."""
    resumed = arguments.resumed
    return resumed is None or Path(arguments.train.output_dir).resolve() != resumed.run.resolve()


def open_folder(arguments: Arguments, screen: Screen, owner: Owner) -> Path:
    """Make the folder of a new run, or take that of the resumed run; one process does it for all.

    Raises:
        ValueError: for a folder that holds another run, or later checkpoints than the one to resume from, or that
            another process is training in.
    """
    folder = Path(distributed.from_first(lambda: str(run_folder(arguments, screen, owner))))
    arguments.train.output_dir = str(folder)
    return folder


def run_folder(arguments: Arguments, screen: Screen, owner: Owner) -> Path:
    """Make the folder of a new run, or make that of the resumed run ready; see `open_folder`."""
    resumed = arguments.resumed
    if resumed is not None and not writes_new_folder(arguments):
        folder = resumed.run
        if resumed.broken:
            for name in set_aside(folder, resumed.checkpoint):
                screen.warn(f"kept aside as {name}")
        newer = [path.name for _, path in checkpoints_in(folder)]
        if resumed.checkpoint is not None and newer and newer[-1] != resumed.checkpoint.name:
            raise ValueError(
                f"{folder} holds {newer[-1]}, which is newer than {resumed.checkpoint.name}: resume from that, or "
                "give a new --output_dir to branch off"
            )
        for name in clear_unfinished(folder):
            screen.say(f"removed {name}, which an interrupted save left")
        return folder
    folder = new_output_dir(arguments.train.output_dir)
    owner.take(folder, TRAINING)
    return folder


# Training.


def make_trainer(run: TrainingRun, rows: Any, stop: StopRequest) -> DyLoRATrainer:
    """Make the Trainer of the run, with the callbacks that log, track and stop it."""
    train = run.arguments.train
    rows_at_once = train.per_device_eval_batch_size * distributed.num_ranks()
    num_batches = sum(math.ceil(len(held) / rows_at_once) for held in run.data.evaluation.values())
    callbacks: list[TrainerCallback] = [run.metrics, ProgressBar(run.screen, num_batches=num_batches), stop]
    if "wandb" in list(train.report_to or ()):
        callbacks.append(CheckpointArtifacts())
    if train.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(train.early_stopping_patience, train.early_stopping_threshold))
    trainer = DyLoRATrainer(
        model=run.model,
        args=train,
        train_dataset=rows,
        eval_dataset=run.data.evaluation,
        data_collator=Collator(run.tokenizer),
        domains=run.data.names,
        training=run.record,
        on_alarm=alarm_printer(run),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def alarm_printer(run: TrainingRun) -> Callable[[int, list[str]], None]:
    """Make the function that prints the alarms about the routing and logs them, on rank 0."""

    def print_alarms(step: int, sentences: list[str]) -> None:
        if not distributed.is_first():
            return
        run.metrics.write(step, {"alarms": sentences})
        for sentence in sentences:
            run.screen.warn(f"step {step}: {sentence}")

    return print_alarms


def benchmark_callback(
    run: TrainingRun, schedule: BenchmarkSchedule, trainer: DyLoRATrainer, stop: StopRequest
) -> BenchmarkCallback:
    """Make the callback that runs benchmarks during training; a signal ends it between two batches, like an
    evaluation."""
    return BenchmarkCallback(
        schedule,
        run.tokenizer,
        run.folder,
        screen=run.screen,
        log=trainer.log,
        between=lambda: stop.on_prediction_step(trainer.args, trainer.state, trainer.control),
        pause=trainer.pause,
    )


def losses_before(run: TrainingRun, trainer: DyLoRATrainer) -> dict[str, float]:
    """Measure the held-out loss of each dataset before training; a resumed run reads it from its checkpoint."""
    if run.arguments.resumed is not None and run.checkpoint is not None:
        return run.arguments.resumed.record["losses_before"]
    return {name: reading.loss for name, reading in evaluate(trainer, "before training").items()}


# After training.


def save_result(run: TrainingRun, trainer: DyLoRATrainer, started: float) -> Path:
    """Save the final checkpoint, evaluate it, and print the results; returns the checkpoint's folder.

    The checkpoint is saved before the evaluation, so that a kill during the evaluation loses no training, and saved
    again with the losses at the very end: from then on the run counts as finished. The result of an earlier end, of
    fewer steps, is kept under another name, and what was evaluated of it too.
    """
    final = run.folder / RESULT
    record = {**run.record, "step": trainer.state.global_step, "epoch": trainer.state.epoch}
    run.model.router.collect_counts()
    if distributed.is_first():
        kept = keep_earlier_result(run.folder, trainer.state.global_step)
        rename_evaluations(run.folder, kept)
        if kept:
            run.screen.say(f"the earlier result is kept as {run.folder / kept[RESULT]}")
        save_checkpoint(run.model, final, training=record)
    try:
        after = evaluate(trainer, "after training")
        samples = sample_of_each(run)
    except Stopped as stopped:
        next_command = f"evaluate it with: {command()} eval {final}"
        raise Stopped(stopped.signal, f"the training is over and saved as {final}; {next_command}") from stopped
    if distributed.is_first():
        before = run.record["losses_before"]
        losses = {"before": before, "after": {name: reading.loss for name, reading in after.items()}}
        plots = write_plots(run.folder / "plots", run.folder / "metrics.jsonl", after)
        log_plots(plots)
        results = Results(before, after, samples, plots)
        show_end(run.screen, run.folder, run.tokenizer, trainer, results, seconds=time.time() - started)
        save_checkpoint(run.model, final, training=record | {LOSSES_AFTER: losses["after"]}, losses=losses)
    return final


def sample_of_each(run: TrainingRun) -> list[RoutedText]:
    """Generate a text from a prompt of each dataset. All ranks take part, because none holds all of a sharded base."""
    run.model.eval()
    samples, prompts = [], run.data.sample_prompts
    with run.screen.counting("generating a text from a prompt of each dataset", len(prompts)) as advance:
        for domain, ids in prompts.items():
            ends = end_ids(run.tokenizer)
            samples.append(sample(run.model, ids, end_ids=ends, max_new_tokens=SAMPLE_TOKENS, label=domain))
            advance(1)
    return samples
