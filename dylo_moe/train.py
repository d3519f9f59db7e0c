"""Joint training: several experts and their router, together, on several kinds of data."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from rich.text import Text
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from . import ranks
from .arguments import Arguments, ModelArguments, new_output_dir, save_config, settings_of
from .base import four_bit, load_base, load_tokenizer
from .checkpoint import save_checkpoint
from .config import GrowthConfig, RouterConfig, parse_router_layer
from .data import Collator, LoadedData, check_texts_kept_apart, epoch_of, load_data
from .evaluate.callback import BenchmarkCallback, Plan, plan_benchmarks
from .facts import run_facts, write_json
from .generate import end_ids, sample
from .meter import Reading
from .model import DyLoRAMoE
from .progress import MetricsFile, ProgressBar
from .resume import CONFIG_FILE, Resumption, checkpoint_name, checkpoints_in, clear_unfinished, data_changes, set_aside
from .run_view import (
    finish,
    go_on,
    how_to_go_on,
    show_best,
    show_loss,
    show_model,
    show_packing,
    show_processes,
    show_resumption,
)
from .sharding import shard_base, take_sharding
from .stopping import EarlyStopping, RankLost, Stopped, StopRequest
from .summary import Sample, show_data, write_plots
from .tracking import CheckpointArtifacts, log_plots, log_settings, prepare
from .trainer import DyLoRATrainer

ROUTER_START_ROWS = 512
"""Training rows whose features start the gate."""
ROUTER_START_BATCH = 16
SAMPLE_TOKENS = 32


def build_model(
    flags: ModelArguments,
    *,
    bf16: bool,
    growth: GrowthConfig | None = None,
    load: Callable[..., PreTrainedModel] = load_base,
) -> DyLoRAMoE:
    """The base with fresh experts and router, as the flags say; every problem of the flags is raised here.

    Args:
        bf16: whether the base is loaded in bfloat16.
        growth: for a pool that begins empty and grows.
        load: makes the base, as `load_base` does.
    """
    router = RouterConfig(
        top_k=flags.top_k,
        router_layer=parse_router_layer(flags.router_layer),
        granularity=flags.granularity,
        policy=flags.router_policy,
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
        load(flags.model, **base_options(flags, bf16=bf16)),
        num_experts=flags.num_experts if growth is None else None,
        lora=lora,
        router=router,
        allow_expert_growth=growth is not None,
        growth=growth,
        balance_coefficient=flags.balance_coefficient,
    )


def base_options(flags: ModelArguments, *, bf16: bool) -> dict[str, Any]:
    """How a base is loaded, as `load_base` takes it."""
    attention = {"attn_implementation": flags.attn_implementation} if flags.attn_implementation else {}
    bits = {"quantization_config": four_bit(torch.bfloat16 if bf16 else torch.float32)} if flags.load_in_4bit else {}
    return {"dtype": torch.bfloat16 if bf16 else "auto", **attention, **bits}


def run(arguments: Arguments) -> Path:
    """Train as the flags say and show the result; returns the folder of the final checkpoint.

    Raises:
        Stopped: when SIGTERM or SIGINT ended it; what was trained is saved, and the message says how to go on.
        RankLost: when another process of the run has gone.
    """
    with StopRequest() as stop:
        try:
            return _run(arguments, stop)
        except (RuntimeError, ValueError, OSError) as error:
            if ranks.num_ranks() > 1:
                stop.leave()
            if ranks.is_lost_peer(error):
                raise RankLost(how_to_go_on(arguments)) from error
            raise


def _run(arguments: Arguments, stop: StopRequest) -> Path:
    started = time.time()
    transformers_logging.disable_progress_bar()
    console = ranks.console()
    settings, sharding = settings_of(arguments), take_sharding(arguments.train, num_processes=ranks.num_ranks())
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
    folder = Path(ranks.from_first(lambda: str(run_folder(console, arguments, settings))))
    arguments.train.output_dir = str(folder)
    prepare(arguments.train, folder)
    log_settings(settings)
    collator = Collator(tokenizer)
    resumed = arguments.resumed
    checkpoint = resumed.checkpoint if resumed is not None else None
    if checkpoint is None and model.router_config.is_learned:
        start_router(model, data, collator, seed=arguments.train.seed)
    metrics = MetricsFile(folder / "metrics.jsonl")
    facts = {**run_facts(model, data), "processes": ranks.num_ranks()}
    training = {"settings": settings, "data": data.fingerprint, "facts": facts}
    if ranks.is_first():
        write_json(folder / "run.json", facts)
    if sharding is not None:
        shard_base(model, sharding, device=arguments.train.device)

    def tell(step: int, sentences: list[str]) -> None:
        if not ranks.is_first():
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
    if ranks.is_first():
        save_checkpoint(model, final, training=record)
    after = evaluate(trainer, console, "after training")
    samples = sample_of_each(model, tokenizer, data)
    if ranks.is_first():
        losses = {"before": before, "after": {name: reading.loss for name, reading in after.items()}}
        save_checkpoint(model, final, training=record, losses=losses)
        plots = write_plots(folder / "plots", folder / "metrics.jsonl", after)
        log_plots(plots)
        show_best(console, trainer)
        finish(console, model, tokenizer, samples, before, after, folder, plots)
        console.print(f"The whole run took {time.time() - started:.0f} s.", highlight=False)
    ranks.leave()
    return final


# Where it begins.


def check_same_data(resumed: Resumption | None, data: LoadedData) -> None:
    """Raises ValueError, with each difference, unless the rows are those that the checkpoint was trained on."""
    if resumed is None or resumed.checkpoint is None:
        return
    differences = data_changes(resumed.record["data"], data.fingerprint, data.names)
    if differences:
        raise ValueError(f"cannot go on from {resumed.checkpoint} with other data: {'; '.join(differences)}")


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


def benchmark_plan(arguments: Arguments) -> Plan | None:
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
    plan: Plan, trainer: DyLoRATrainer, tokenizer: PreTrainedTokenizerBase, folder: Path, console: Console
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


def start_router(model: DyLoRAMoE, data: LoadedData, collator: Collator, *, seed: int) -> None:
    """Start the gate from the first training rows."""
    num_rows = min(ROUTER_START_ROWS, len(data.train))
    batches = (
        collator([data.train[row] for row in range(start, min(start + ROUTER_START_BATCH, num_rows))])
        for start in range(0, num_rows, ROUTER_START_BATCH)
    )
    model.initialize_router(batches, seed=seed)


# Training.


def take_up_log(console: Console, metrics: MetricsFile, checkpoint: Path | None) -> TrainerState | None:
    """Bring metrics.jsonl to where training begins; returns the Trainer's state there, None at the very beginning."""
    if checkpoint is None:
        if ranks.is_first():
            metrics.path.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        return None
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if not ranks.is_first():
        return state
    dropped = metrics.rewind(state.log_history)
    if dropped:
        console.print(f"{dropped} lines of metrics.jsonl came after it; they are logged again", highlight=False)
    return state


def train_on(trainer: DyLoRATrainer, stop: StopRequest, checkpoint: Path | None, state: TrainerState | None) -> None:
    """Train to the end, or until asked to stop; then what was trained is saved.

    Args:
        checkpoint, state: what to go on from, and the Trainer's state there.

    Raises:
        Stopped: with how to go on.
    """
    if checkpoint is not None and state is not None and is_over(trainer, state):
        trainer.take_up(checkpoint, state)
        return
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Stopped:
        trainer.save_now()
    if stop.number is not None:
        folder = Path(str(trainer.args.output_dir))
        raise Stopped(
            stop.number,
            f"saved {folder / checkpoint_name(trainer.state.global_step)}. {go_on(folder)}",
        )


def is_over(trainer: DyLoRATrainer, state: TrainerState) -> bool:
    """Whether no step is left to a training that stands there."""
    early = next((item for item in trainer.callback_handler.callbacks if isinstance(item, EarlyStopping)), None)
    return state.global_step >= trainer.total_steps or (early is not None and early.says_stop(state.log_history))


def evaluate(trainer: DyLoRATrainer, console: Console, when: str) -> dict[str, Reading]:
    """The held-out reading of every dataset."""
    with console.status(f"evaluating {when}"):
        trainer.evaluate()
    return dict(trainer.readings)


def sample_of_each(model: DyLoRAMoE, tokenizer: PreTrainedTokenizerBase, data: LoadedData) -> list[Sample]:
    """A text from each dataset's prompt; all ranks generate the same, for none has all of a sharded base."""
    model.eval()
    return [
        sample(model, ids, end_ids=end_ids(tokenizer), max_new_tokens=SAMPLE_TOKENS, label=domain)
        for domain, ids in data.sample_prompts.items()
    ]
