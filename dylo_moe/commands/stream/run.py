"""The command `dylora stream`: learn one skill after another, each in a stage that ends with a checkpoint."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.stream.agreement import share_knowledge
from dylo_moe.commands.stream.arguments import NOT_OFFERED
from dylo_moe.commands.stream.context import StreamContext
from dylo_moe.commands.stream.data import (
    Roles,
    all_data,
    read_data,
    roles_of,
    rows_of,
    sample_of,
    stages_of,
    stream_rows,
    text_means,
)
from dylo_moe.commands.stream.measure import measure_base
from dylo_moe.commands.stream.request import StreamRequest
from dylo_moe.commands.stream.screen import (
    how_to_resume,
    lost_process,
    show_begin,
    show_changes,
    show_end,
    show_stream_data,
)
from dylo_moe.commands.stream.stage import run_stage
from dylo_moe.commands.stream.state import (
    StreamState,
    clear_leftovers,
    finish_stream,
    is_finished,
    last_checkpoint,
    read_state,
    write_view,
)
from dylo_moe.continual.change_points import change_points
from dylo_moe.data.collator import Collator
from dylo_moe.data.loading import LoadedData
from dylo_moe.data.packing import check_texts_kept_apart
from dylo_moe.evaluation.loss_matrix import Matrix
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.terminal import show_device, show_loss, show_routing
from dylo_moe.training.build import base_options, build_model
from dylo_moe.training.fit import removed_unless_trained
from dylo_moe.training.preflight import Configs, check_before_reading, check_rows
from dylo_moe.training.resume import data_changes
from dylo_moe.training.run_folder import CONFIG_FILE, new_output_dir, save_config
from dylo_moe.training.run_info import run_facts
from dylo_moe.training.sharding import ACCELERATE_SWITCH
from dylo_moe.training.stopping import StopRequest
from dylo_moe.utils import distributed
from dylo_moe.utils.errors import RankLost, Stopped, UsageError
from dylo_moe.utils.file_names import RESULT
from dylo_moe.utils.owner import Owner
from dylo_moe.utils.screen import Screen

STREAMING = "learning a stream"
"""What is done in a stream's folder, for the message to a second process."""


def stream(request: StreamRequest) -> Path:
    """Learn the datasets as the flags say and print the result; returns the folder of the final checkpoint.

    Raises:
        Stopped: when SIGTERM or SIGINT ended it; the message says how to resume.
        RankLost: when another process of the stream has gone.
    """
    transformers_logging.disable_progress_bar()
    screen = distributed.screen("stream")
    if request.resumed is not None and is_finished(request.resumed):
        screen.say(f"{request.resumed} is finished: nothing is left to learn, and nothing was written.")
        final = request.resumed / RESULT
        screen.result("checkpoint", final)
        distributed.leave()
        return final
    with StopRequest(finishes_evaluations=True) as stop, Owner() as owner:
        try:
            return _stream(request, screen, stop, owner)
        except (RuntimeError, ValueError, OSError) as error:
            if distributed.num_ranks() > 1:
                stop.leave()
            if distributed.is_lost_peer(error):
                raise RankLost(lost_process(Path(request.train.output_dir))) from error
            raise


def _stream(request: StreamRequest, screen: Screen, stop: StopRequest, owner: Owner) -> Path:
    """Run a stream from its flags to its final checkpoint."""
    started = time.time()
    check_not_sharded()
    if (resumed := request.resumed) is not None:
        distributed.first_does(lambda: owner.take(resumed, STREAMING))
    limits = check_before_reading(*configs_of(request), is_new=request.resumed is None, growth=request.growth)
    show_device(screen, request.train)
    set_seed(request.train.seed)
    tokenizer = tokenizer_of(request)
    data = read_data(request, tokenizer)
    check_rows(limits, data, tokenizer, screen, max_seq_length=request.data.max_seq_length)
    show_stream_data(screen, data, roles_of(request, data))
    folder, checkpoint = open_folder(request, owner)
    try:
        with removed_unless_trained(folder, is_new=request.resumed is None):
            collator = Collator(tokenizer)
            state, model = start_state(request, data, collator, checkpoint)
            show_routing(screen, model)
            show_loss(screen, model, request.model.loss_chunk_size)
            if model.left_out is not None:
                screen.say(f"No expert adapts {model.left_out}.")
            record = {"settings": request.settings, "data": data.fingerprint, "facts": run_facts(model, data)}
            context = StreamContext(request, data, collator, folder, screen, stop, record)
            final = run_stages(context, model, state, checkpoint)
    except Stopped as stopped:
        if not folder.exists():
            raise
        raise Stopped(stopped.signal, how_to_resume(folder)) from stopped
    show_end(context, final, time.time() - started)
    distributed.leave()
    return final


def run_stages(context: StreamContext, model: DyLoRAMoE, state: StreamState, checkpoint: Path | None) -> Path:
    """Run the stages that are not done yet, one after another; returns the folder of the final checkpoint."""
    if context.request.data.packing:
        check_texts_kept_apart(model, model.base)
    stages = stages_of(context.request, context.data, changes_in(context, model))
    show_begin(context, state, checkpoint, num_stages=len(stages))
    if not state.matrix.base:
        measure_base(context, model, state)
    distributed.first_does(lambda: write_view(context.folder, state, is_over=False))
    for place, data in enumerate(stages):
        if place >= state.num_done:
            run_stage(context, model, state, place, data)
    return Path(distributed.from_first(lambda: str(finish_stream(context.folder, state))))


def changes_in(context: StreamContext, model: DyLoRAMoE) -> list[int]:
    """The rows of a stream in chunks at which another kind of text begins; none where stages are datasets.

    They follow from the frozen base and the rows alone, so that a resumed stream finds the same.
    """
    request = context.request
    if request.stream.chunk_examples is None:
        return []
    means = text_means(model, stream_rows(request, context.data), context.collator)
    changes = change_points(means, false_alarm_rate=request.growth.false_alarm_rate)
    changes = distributed.value_of_first(changes)
    show_changes(context, changes)
    return changes


# The beginning.


def check_not_sharded() -> None:
    """Raise UsageError where the launcher asks for a sharded base."""
    if os.environ.get(ACCELERATE_SWITCH, "false").lower() == "true":
        raise UsageError(f"accelerate launch asks for FSDP, and {NOT_OFFERED['fsdp']}; launch it with DDP")


def configs_of(request: StreamRequest) -> Configs:
    """The configs of the stream; where --checkpoint is given, its manifest names the base."""
    model = request.model
    if request.stream.checkpoint is not None:
        model = replace(model, model=read_manifest(request.stream.checkpoint)["base"]["id"])
    return model, request.experts, request.router, all_data(request), request.train


def tokenizer_of(request: StreamRequest) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the base; where --checkpoint is given, its manifest names the base."""
    if request.stream.checkpoint is None:
        return load_tokenizer(request.model.model, accept_terms=request.model.accept_gemma_terms)
    base = read_manifest(request.stream.checkpoint)["base"]
    return load_tokenizer(base["id"], revision=base["revision"])


def open_folder(request: StreamRequest, owner: Owner) -> tuple[Path, Path | None]:
    """Open the folder of the stream, new or resumed; one process does it for all.

    Returns:
        The folder, and the checkpoint of the last stage that is done.
    """
    if request.resumed is not None:
        resumed = request.resumed
        distributed.first_does(lambda: clear_leftovers(resumed, keep=request.stream.keep_stages))
        return resumed, last_checkpoint(resumed)
    folder = Path(distributed.from_first(lambda: str(_new_folder(request, owner))))
    request.train.output_dir = str(folder)
    return folder, None


def _new_folder(request: StreamRequest, owner: Owner) -> Path:
    folder = new_output_dir(request.train.output_dir)
    owner.take(folder, STREAMING)
    state = StreamState(Matrix([]), processes=request.processes)
    write_view(folder, state, is_over=False)  # a stream killed from here on can be resumed
    save_config(request.settings, folder / CONFIG_FILE)
    return folder


def start_state(
    request: StreamRequest, data: LoadedData, collator: Collator, checkpoint: Path | None
) -> tuple[StreamState, DyLoRAMoE]:
    """Make or load the state and the model as they are before the first stage that is not done.

    Args:
        checkpoint: the checkpoint of the last stage that is done; None: start with a new pool, or with --checkpoint's.

    Raises:
        ValueError: where the rows are not those of the resumed stream, or --checkpoint does not say what it knows.
    """
    if checkpoint is not None:
        state, record = read_state(checkpoint)
        differences = data_changes(record, data.fingerprint, data.names)
        if differences:
            raise ValueError(f"cannot resume from {checkpoint} with other data: {'; '.join(differences)}")
        state.processes = request.processes
        options = base_options(request.model, bf16=request.train.bf16)
        return state, DyLoRAMoE.from_pretrained(str(checkpoint), **options)
    roles = roles_of(request, data)
    model = start_pool(request, data, collator, roles)
    share_knowledge(model)
    known = [name for name in roles.measured if model.knows(name)]
    matrix = Matrix([*roles.learned, *known], [name for name in roles.measured if name not in known])
    trained = {name: {model.library[name].expert: 0} for name in known}
    return StreamState(matrix, trained, request.processes), model


def start_pool(request: StreamRequest, data: LoadedData, collator: Collator, roles: Roles) -> DyLoRAMoE:
    """Make a pool that holds the base alone, or load --checkpoint's with its skills in the library."""
    stream, seed = request.stream, request.train.seed

    def sample(name: str) -> Iterator[dict[str, Tensor]]:
        return sample_of(rows_of(data, name), collator, stream.skill_examples)

    if stream.checkpoint is None:
        model = build_model(
            request.model, request.experts, request.router, bf16=request.train.bf16, growth=request.growth
        )
    else:
        options = base_options(request.model, bf16=request.train.bf16)
        model = DyLoRAMoE.from_pretrained(stream.checkpoint, **options)
        for name in roles.known:
            model.know_skill(name, sample(name), seed=seed)
        if model.growth is None:
            raise ValueError(
                f"{stream.checkpoint} does not say what its experts know, so that all data would be new to it; give "
                "what it was trained on as --known_datasets"
            )
    if roles.base:
        model.know_base(itertools.chain.from_iterable(map(sample, roles.base)), seed=seed)
    if not stream.allow_expert_growth:
        model.fix_pool(request.growth)
    elif stream.checkpoint is not None:
        model.enable_growth(request.growth, seed=seed)
    return model
