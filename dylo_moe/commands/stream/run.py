"""The life of a skill, over a stream: novel or known, growth, training, maturity, evaluation, checkpoint."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.stream.arguments import StreamRequest
from dylo_moe.commands.stream.stage_trainer import StageTrainer
from dylo_moe.commands.stream.state import (
    StreamState,
    clear_leftovers,
    finish_stream,
    last_checkpoint,
    read_state,
    save_stage,
    stage_folder,
    write_view,
)
from dylo_moe.continual.growth import GROWN, SkillDecision
from dylo_moe.data.collator import Collator
from dylo_moe.data.loading import LoadedData, load_data
from dylo_moe.data.packing import check_texts_kept_apart, epoch_of
from dylo_moe.evaluation.loss_matrix import Matrix, Stage
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.loss_matrix_table import MatrixTable, show_matrix
from dylo_moe.report.run_page import write_report as write_report
from dylo_moe.report.terminal import show_data, show_loss
from dylo_moe.routing.config import BASE
from dylo_moe.training.build import base_options, build_model
from dylo_moe.training.callbacks import MetricsFile, ProgressBar
from dylo_moe.training.fit import command, take_up_log, train_on
from dylo_moe.training.resume import data_changes
from dylo_moe.training.run_folder import CONFIG_FILE, checkpoints_in, new_output_dir, save_config
from dylo_moe.training.run_info import run_facts
from dylo_moe.training.stopping import StopRequest
from dylo_moe.training.trainer import DyLoRATrainer
from dylo_moe.utils.atomic_files import write_json
from dylo_moe.utils.errors import Stopped

SKILL_BATCH = 16


class Piece(NamedTuple):
    """The data of one stage."""

    name: str
    """Of the dataset, or of the chunk."""
    rows: Dataset
    rank: int | None


class Course(NamedTuple):
    """What a whole stream works with."""

    request: StreamRequest
    data: LoadedData
    collator: Collator
    folder: Path
    console: Console
    stop: StopRequest
    record: dict[str, Any]
    """What every checkpoint's manifest holds: settings, the rows' fingerprint, facts."""


def stream(request: StreamRequest) -> Path:
    """Learn as the flags say and show the result; returns the folder of the final checkpoint.

    Raises:
        Stopped: when SIGTERM or SIGINT ended it; the message says how to go on.
    """
    started = time.time()
    transformers_logging.disable_progress_bar()
    console = Console()
    with StopRequest() as stop:
        set_seed(request.train.seed)
        tokenizer = tokenizer_of(request)
        data = read_data(request, tokenizer)
        show_data(console, data)
        folder, checkpoint = open_folder(request)
        try:
            collator = Collator(tokenizer)
            state, model = begin(request, data, collator, checkpoint)
            show_loss(console, model, request.model.loss_chunk_size)
            record = {"settings": request.settings, "data": data.fingerprint, "facts": run_facts(model, data)}
            course = Course(request, data, collator, folder, console, stop, record)
            final = learn_all(course, model, state, checkpoint)
        except Stopped as stopped:
            text = f"go on with: {command()} stream --resume_from_checkpoint {folder}"
            raise Stopped(stopped.signal, text) from stopped
    show_end(course, final, time.time() - started)
    return final


def learn_all(course: Course, model: DyLoRAMoE, state: StreamState, checkpoint: Path | None) -> Path:
    """The stages that are not over yet, one after another; returns the folder of the final checkpoint."""
    if course.request.data.packing:
        check_texts_kept_apart(model, model.base)
    stages = pieces(course)
    show_where(course, state, checkpoint, num_stages=len(stages))
    if not state.matrix.base:
        measure_base(course, model, state)
    write_view(course.folder, state, is_finished=False)
    for place, piece in enumerate(stages):
        if place >= state.num_done:
            live(course, model, state, place, piece)
    return finish_stream(course.folder, state)


# Where it begins.


def tokenizer_of(request: StreamRequest) -> PreTrainedTokenizerBase:
    """The base's, which a --checkpoint names."""
    if request.stream.checkpoint is None:
        return load_tokenizer(request.model.model)
    base = read_manifest(request.stream.checkpoint)["base"]
    return load_tokenizer(base["id"], revision=base["revision"])


def read_data(request: StreamRequest, tokenizer: PreTrainedTokenizerBase) -> LoadedData:
    """All datasets at once, in the order of `Roles`, so that no row of one repeats another's."""
    stream = request.stream
    names = [*request.data.datasets, *stream.eval_datasets, *stream.known_datasets, *stream.base_datasets]
    return load_data(replace(request.data, datasets=names), tokenizer, seed=request.train.seed)


def open_folder(request: StreamRequest) -> tuple[Path, Path | None]:
    """The stream's folder, with its settings in it, and the checkpoint of the last stage that is over."""
    if request.resumed is not None:
        clear_leftovers(request.resumed)
        return request.resumed, last_checkpoint(request.resumed)
    folder = new_output_dir(request.train.output_dir)
    write_view(folder, StreamState(Matrix([])), is_finished=False)  # a kill from here on leaves a stream that goes on
    save_config(request.settings, folder / CONFIG_FILE)
    return folder, None


class Roles(NamedTuple):
    """The names of the datasets, by what they are for."""

    learned: list[str]
    measured: list[str]
    known: list[str]
    base: list[str]


def roles_of(request: StreamRequest, data: LoadedData) -> Roles:
    """As the data calls them, which was read in this order."""
    stream, names = request.stream, iter(data.names)
    groups = (request.data.datasets, stream.eval_datasets, stream.known_datasets, stream.base_datasets)
    return Roles(*([next(names) for _ in group] for group in groups))


def begin(
    request: StreamRequest, data: LoadedData, collator: Collator, checkpoint: Path | None
) -> tuple[StreamState, DyLoRAMoE]:
    """State and model to go on from: a new pool, --checkpoint's, or that of the last stage that is over.

    Raises:
        ValueError: where the rows are not those of the stream that goes on, or it is not known what a checkpoint knows.
    """
    if checkpoint is not None:
        state, record = read_state(checkpoint)
        differences = data_changes(record["data"], data.fingerprint, data.names)
        if differences:
            raise ValueError(f"cannot go on from {checkpoint} with other data: {'; '.join(differences)}")
        options = base_options(request.model, bf16=request.train.bf16)
        return state, DyLoRAMoE.from_pretrained(str(checkpoint), **options)
    roles = roles_of(request, data)
    model = begin_pool(request, data, collator, roles)
    known = [name for name in roles.measured if model.knows(name)]
    matrix = Matrix([*roles.learned, *known], [name for name in roles.measured if name not in known])
    return StreamState(matrix, {name: {model.library[name].expert: 0} for name in known}), model


def begin_pool(request: StreamRequest, data: LoadedData, collator: Collator, roles: Roles) -> DyLoRAMoE:
    """A new pool, empty but for the base, or --checkpoint's with what is told of its skills."""
    stream, seed = request.stream, request.train.seed

    def some(name: str) -> Iterator[dict[str, Tensor]]:
        return sample_of(rows_of(data, name), collator, stream.skill_examples)

    if stream.checkpoint is None:
        model = build_model(request.model, bf16=request.train.bf16, growth=stream.growth)
    else:
        options = base_options(request.model, bf16=request.train.bf16)
        model = DyLoRAMoE.from_pretrained(stream.checkpoint, **options)
        for name in roles.known:
            model.know_skill(name, some(name), seed=seed)
        if model.growth is None:
            raise ValueError(
                f"{stream.checkpoint} does not say what its experts know, so that all data would be new to it; give "
                "what it was trained on as --known_datasets"
            )
    if roles.base:
        model.know_base(itertools.chain.from_iterable(map(some, roles.base)), seed=seed)
    if not stream.allow_expert_growth:
        model.fix_pool(stream.growth)
    elif stream.checkpoint is not None:
        model.enable_growth(stream.growth, seed=seed)
    return model


def rows_of(data: LoadedData, name: str) -> Dataset:
    """The training rows of one dataset, in the order of the epoch."""
    return data.train.select(np.flatnonzero(np.asarray(data.train["domain"]) == data.names.index(name)))


def sample_of(rows: Dataset, collator: Collator, most: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the first rows, for the detector and the library."""
    count = min(most, len(rows))
    for start in range(0, count, SKILL_BATCH):
        yield collator([rows[row] for row in range(start, min(start + SKILL_BATCH, count))])


def pieces(course: Course) -> Sequence[Piece]:
    """The data of each stage: a dataset, or a chunk of all of them behind one another."""
    request, data = course.request, course.data
    names = roles_of(request, data).learned
    size = request.stream.chunk_examples
    if size is None:
        ranks: Sequence[int | None] = request.stream.ranks or [None] * len(names)
        return [Piece(name, rows_of(data, name), rank) for name, rank in zip(names, ranks, strict=True)]
    rows = concatenate_datasets([rows_of(data, name) for name in names])
    starts = range(0, len(rows) - len(rows) % size, size) or [0]
    return [
        Piece(f"chunk_{place + 1}", rows.select(range(start, len(rows) if start == starts[-1] else start + size)), None)
        for place, start in enumerate(starts)
    ]


# A stage.


def live(course: Course, model: DyLoRAMoE, state: StreamState, place: int, piece: Piece) -> None:
    """One stage: novelty, growth, library, gate row, training, maturity, evaluation, checkpoint.

    All of it follows from the state before and the stage's seed, so that a stage which was killed is done again, from
    the last checkpoint of its training, and ends as if it had not been.
    """
    started, stream = time.time(), course.request.stream
    seed = course.request.train.seed + place
    set_seed(seed)
    folder = stage_folder(course.folder, place, piece.name)
    folder.mkdir(parents=True, exist_ok=True)
    course.console.rule(Text(f"stage {place + 1}: {piece.name}, {len(piece.rows):,} rows"), align="left", style="dim")
    name = free_name(model, piece.name if stream.chunk_examples is None else f"skill_{len(model.experts) + 1}")
    decision = model.add_skill(
        name,
        sample_of(piece.rows, course.collator, stream.skill_examples),
        rank=piece.rank,
        expert=stream.learn_with,
        seed=seed,
    )
    show_decision(course, piece, decision)
    num_tokens = 0
    if decision.expert is not None:
        is_new = decision.action == GROWN
        num_tokens = train_stage(course, model, folder, piece, expert=decision.expert, is_new=is_new, seed=seed)
        if is_new:
            model.mature(decision.expert)
        for dataset, count in rows_by_dataset(course, piece).items():
            state.note_training(dataset, decision.expert, count)
    stage = Stage(piece.name, {}, tokens=num_tokens, decision=decision._asdict())
    state.matrix.stages.append(stage)
    measure_stage(course, model, state, stage, decision)
    stage.seconds = round(time.time() - started, 1)
    save_stage(model, course.folder, folder, state, course.record, keep=stream.keep_stages)
    show_matrix(course.console, state.matrix)


def rows_by_dataset(course: Course, piece: Piece) -> dict[str, int]:
    """How many rows of a stage each dataset gave."""
    domains, counts = np.unique(np.asarray(piece.rows["domain"]), return_counts=True)
    return {course.data.names[domain]: int(count) for domain, count in zip(domains, counts, strict=True)}


def free_name(model: DyLoRAMoE, wanted: str) -> str:
    """The name of a new expert: as wanted, or numbered where that is taken."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in wanted)
    plain = plain.strip("-_")[:60] or "skill"
    taken = {*model.experts.names, *(model.library.names if model.growth is not None else ())}
    return next(name for name in (plain, *(f"{plain}_{n}" for n in range(2, 10_000))) if name not in taken)


def train_stage(
    course: Course, model: DyLoRAMoE, folder: Path, piece: Piece, *, expert: str, is_new: bool, seed: int
) -> int:
    """Train the expert of a stage, from the last checkpoint that lies in its folder; returns on how many tokens."""
    stream = course.request.stream
    arguments = copy.copy(course.request.train)
    arguments.output_dir, arguments.seed = str(folder), seed
    arguments.learning_rate = stream.seeding_learning_rate
    metrics = MetricsFile(folder / "metrics.jsonl")
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=epoch_of(piece.rows, course.request.data),
        data_collator=course.collator,
        domains=course.data.names,
        training=dict(course.record),
        callbacks=[metrics, ProgressBar(course.console), course.stop],
        expert=expert,
        stream=stream,
        is_new=is_new,
    )
    trainer.remove_callback(PrinterCallback)
    found = checkpoints_in(folder)
    checkpoint = found[-1][1] if found else None
    if checkpoint is not None:
        course.console.print(f"going on from {checkpoint}", highlight=False, soft_wrap=True)
    state = take_up_log(course.console, metrics, checkpoint)
    save_config(course.request.settings, folder / CONFIG_FILE)
    facts, own = run_facts(model, course.data), rows_by_dataset(course, piece)
    write_json(folder / "run.json", {**facts, "data": [item for item in facts["data"] if item["name"] in own]})
    train_on(trainer, course.stop, checkpoint, state)
    write_json(folder / "samples.json", [])  # a run that has it has ended; a stage generates none
    write_report(str(folder))
    model.eval()
    return trainer.num_tokens


# Evaluation.


def evaluator(course: Course, model: DyLoRAMoE) -> DyLoRATrainer:
    """What reads held-out losses and routing."""
    arguments = copy.copy(course.request.train)
    arguments.output_dir = str(course.folder)
    trainer = DyLoRATrainer(
        model=model, args=arguments, data_collator=course.collator, domains=course.data.names, callbacks=[course.stop]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_base(course: Course, model: DyLoRAMoE, state: StreamState) -> None:
    """The first row of the matrix: the base alone."""
    reader = evaluator(course, model)
    with course.console.status("evaluating the base"), model.route_to(None):
        for name in (*state.matrix.skills, *state.matrix.unlearned):
            reader.evaluate({name: course.data.evaluation[name]})
            state.matrix.base[name] = reader.readings[name].loss


def measure_stage(course: Course, model: DyLoRAMoE, state: StreamState, stage: Stage, decision: SkillDecision) -> None:
    """A row of the matrix; on a terminal it fills as it is measured."""
    reader = evaluator(course, model)
    with Live(MatrixTable(state.matrix), console=course.console, transient=True) as screen:
        for name in (*state.matrix.skills, *state.matrix.unlearned):
            rows = {name: course.data.evaluation[name]}
            reader.evaluate(rows)
            reading, owner = reader.readings[name], state.owner(name)
            stage.losses[name] = reading.loss
            if name in state.matrix.unlearned:
                owner = BASE
            if owner in reading.shares:
                stage.accuracy[name] = reading.shares[owner]
            if owner is not None and owner == decision.expert:
                with model.route_to(owner):
                    reader.evaluate(rows)
                stage.alone[name] = reader.readings[name].loss
            screen.refresh()


# What is told.


def show_where(course: Course, state: StreamState, checkpoint: Path | None, *, num_stages: int) -> None:
    """What the stream goes on from."""
    console = course.console
    if checkpoint is not None:
        console.print(f"going on from {checkpoint}: {state.num_done} of {num_stages} stages are over", highlight=False)
    elif course.request.stream.checkpoint is not None:
        console.print(f"learning on with {course.request.stream.checkpoint}", highlight=False)
    console.print(f"{num_stages} stages, in {course.folder}", highlight=False, soft_wrap=True)


def show_decision(course: Course, piece: Piece, decision: SkillDecision) -> None:
    """Why this data is new or known, and what follows."""
    seen = min(len(piece.rows), course.request.stream.skill_examples)
    what = "new" if decision.novel else "known"
    why = "nothing is known yet"
    if decision.nearest is not None:
        why = f"score {decision.score:.4g}, threshold {decision.threshold:.4g}, nearest skill {decision.nearest}"
    text = (
        f"{piece.name} is {what}: {why}, router entropy {decision.entropy:.2f} nats, from {seen:,} of "
        f"{len(piece.rows):,} rows. "
    )
    follows = {
        "grown": f"It grows the expert {decision.expert}.",
        "consolidated": f"Its data consolidates the expert {decision.expert}.",
        "skipped": "It is skipped: nothing is trained.",
        "reported": "The pool is fixed, so nothing is trained; --learn_with EXPERT says who shall learn it.",
    }
    style = "yellow" if decision.expert is None else ""
    course.console.print(Text(text + follows[decision.action], style=style), soft_wrap=True)


def show_end(course: Course, final: Path, seconds: float) -> None:
    """The matrix, where things lie, and what to type next."""
    page = write_report(str(course.folder))
    course.console.rule(style="dim")
    for label, path in (("checkpoint", final), ("matrix", course.folder / "matrix.json"), ("page", page)):
        course.console.print(f"{label:11s} {path}", highlight=False, soft_wrap=True)
    course.console.print(f"The whole stream took {seconds:.0f} s.\n\nTeach it more:\n", highlight=False)
    course.console.print(
        f"  {command()} stream --checkpoint {final} --datasets NAME\n", highlight=False, soft_wrap=True, markup=False
    )
