"""One stage of a stream: novelty decision, growth, training, maturity, evaluation and checkpoint."""

from __future__ import annotations

import copy
import time
from pathlib import Path

from datasets import Dataset
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import IntervalStrategy

from dylo_moe.commands.stream.agreement import agreed
from dylo_moe.commands.stream.context import StreamContext
from dylo_moe.commands.stream.data import StageData, rows_by_dataset, sample_of
from dylo_moe.commands.stream.early_stop import StageStopping, split_rows
from dylo_moe.commands.stream.measure import measure_stage
from dylo_moe.commands.stream.request import StageArguments
from dylo_moe.commands.stream.screen import show_decision, show_stage, show_unseparated
from dylo_moe.commands.stream.stage_trainer import StageTrainer
from dylo_moe.commands.stream.state import StreamState, save_stage, stage_folder
from dylo_moe.continual.config import GROWN
from dylo_moe.continual.growth import SkillDecision
from dylo_moe.data.packing import epoch_of
from dylo_moe.evaluation.loss_matrix import Stage
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.loss_matrix_table import show_matrix
from dylo_moe.report.pages import write_report
from dylo_moe.training.callbacks import MetricsFile, ProgressBar
from dylo_moe.training.fit import resume_log, train_to_end
from dylo_moe.training.run_folder import CONFIG_FILE, checkpoints_in, save_config
from dylo_moe.training.run_info import run_facts
from dylo_moe.utils import distributed
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.words import counted


def run_stage(context: StreamContext, model: DyLoRAMoE, state: StreamState, place: int, data: StageData) -> None:
    """Run one stage: decide whether its data is new, train an expert on it, measure, and save.

    The result of a stage depends only on the state before it and on its own seed. So a stage that was killed is run
    again, from the last checkpoint of its training, and ends bit-equal to one that was not killed.

    Args:
        place: the index of the stage in the stream, from 0.
    """
    started, stream = time.time(), context.request.stream
    seed = context.request.train.seed + place
    set_seed(seed)
    folder = stage_folder(context.folder, place, data.name)
    distributed.first_does(lambda: folder.mkdir(parents=True, exist_ok=True))
    show_stage(context, place + 1, data)
    decision = model.add_skill(
        free_name(model, data.name if stream.chunk_examples is None else f"skill_{len(model.experts) + 1}"),
        sample_of(data.rows, context.collator, stream.skill_examples),
        rank=data.rank,
        expert=stream.learn_with,
        seed=seed,
    )
    decision = agreed(model, data.name, decision)
    show_decision(context, data, decision)
    num_tokens = learn(context, model, state, folder, data, decision, seed=seed)
    stage = Stage(data.name, {}, tokens=num_tokens, decision=decision._asdict())
    state.matrix.stages.append(stage)
    measure_stage(context, model, state, stage, decision)
    stage.seconds = round(time.time() - started, 1)
    model.router.collect_counts()
    distributed.first_does(
        lambda: save_stage(model, context.folder, folder, state, context.record, keep=stream.keep_stages)
    )
    show_matrix(context.screen, state.matrix)
    show_unseparated(context, model, decision)


def free_name(model: DyLoRAMoE, wanted: str) -> str:
    """Find a name for a new expert: the wanted one, or a numbered one where that is taken."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in wanted)
    plain = plain.strip("-_")[:60] or "skill"
    taken = {*model.experts.names, *(model.library.names if model.growth is not None else ())}
    return next(name for name in (plain, *(f"{plain}_{n}" for n in range(2, 10_000))) if name not in taken)


def learn(
    context: StreamContext,
    model: DyLoRAMoE,
    state: StreamState,
    folder: Path,
    data: StageData,
    decision: SkillDecision,
    *,
    seed: int,
) -> int:
    """Train the expert that a decision names, if any; a new one is mature afterwards. Returns the number of tokens
    trained on."""
    if decision.expert is None:
        return 0
    is_new = decision.action == GROWN
    num_tokens = train_expert(context, model, folder, data, expert=decision.expert, is_new=is_new, seed=seed)
    if is_new:
        model.mature(decision.expert)
    for dataset, count in rows_by_dataset(context.data, data).items():
        state.note_training(dataset, decision.expert, count)
    return num_tokens


def train_expert(
    context: StreamContext, model: DyLoRAMoE, folder: Path, data: StageData, *, expert: str, is_new: bool, seed: int
) -> int:
    """Train one expert, from the last checkpoint in the stage's folder if there is one.

    Returns:
        The number of tokens trained on, including those before the checkpoint.
    """
    request = context.request
    arguments = copy.copy(request.train)
    arguments.output_dir, arguments.seed = str(folder), seed
    arguments.learning_rate = request.stream.seeding_learning_rate
    metrics = MetricsFile(folder / "metrics.jsonl")
    stopping, rows, kept_back = early_stopping(context, arguments, data)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=epoch_of(rows, request.data),
        eval_dataset=kept_back,
        data_collator=context.collator,
        domains=context.data.names,
        training=dict(context.record),
        callbacks=[metrics, ProgressBar(context.screen), context.stop, *stopping],
        expert=expert,
        stream=request.stream,
        is_new=is_new,
    )
    trainer.remove_callback(PrinterCallback)
    for item in stopping:
        item.trainer = trainer
    found = checkpoints_in(folder)
    checkpoint = found[-1][1] if found else None
    if checkpoint is not None:
        context.screen.say(f"resuming from {checkpoint}")
    trainer_state = resume_log(context.screen, metrics, checkpoint)
    if distributed.is_first():
        write_run_files(context, model, folder, data)
    train_to_end(trainer, context.stop, checkpoint, trainer_state)
    trainer.end_with_best()
    for item in stopping:
        item.say_end()
    if distributed.is_first():
        # An ended run has this file, which its report looks for; a stage generates no samples.
        write_json(folder / "samples.json", [])
        write_report(str(folder))
    model.eval()
    return trainer.num_tokens


def early_stopping(
    context: StreamContext, arguments: StageArguments, data: StageData
) -> tuple[list[StageStopping], Dataset, Dataset | None]:
    """Prepare a stage for early stopping, if it was asked for.

    Args:
        arguments: those of the stage's Trainer, which are changed.

    Returns:
        The callback, the rows to train, and those that are kept back.
    """
    patience = arguments.early_stopping_patience
    if patience is None:
        return [], data.rows, None
    trained, kept_back = split_rows(data.rows, data.name)
    arguments.eval_strategy = IntervalStrategy.STEPS
    arguments.eval_steps = arguments.eval_steps or arguments.logging_steps
    context.screen.say(
        f"{len(kept_back):,} of {counted(len(data.rows), 'row')} are kept back from training: when their loss has not "
        f"fallen for {counted(patience, 'evaluation')}, one every {arguments.eval_steps:g} steps, the stage ends early"
    )
    return [StageStopping(patience, arguments.early_stopping_threshold, screen=context.screen)], trained, kept_back


def write_run_files(context: StreamContext, model: DyLoRAMoE, folder: Path, data: StageData) -> None:
    """Write the settings and the facts of a stage's training, as `dylora train` does for a run."""
    save_config(context.request.settings, folder / CONFIG_FILE)
    facts, own = run_facts(model, context.data), rows_by_dataset(context.data, data)
    write_json(folder / "run.json", {**facts, "data": [item for item in facts["data"] if item["name"] in own]})
