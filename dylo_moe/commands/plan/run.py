"""`dylora plan`: what a training run would be, without a GPU and without any weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dylo_moe.commands.plan.known_shapes import base_config
from dylo_moe.commands.plan.per_process import FLAT, Processes, one_process, processes_of, trained_bytes
from dylo_moe.commands.plan.simulated_step import (
    ADAM_STATES,
    BASE,
    EXPERTS,
    GRADIENTS,
    OPTIMIZER,
    PARTS,
    Batch,
    Simulation,
)
from dylo_moe.commands.plan.workload import Workload, workload
from dylo_moe.commands.train.request import Arguments
from dylo_moe.model.loss import chunk_loss
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.training.build import ROUTER_START_ROWS, build_model

BF16_BYTES = 2

MB = 1e6

EXPERTS_LISTED = 8
"""Up to so many experts get a line each."""

ALONE = Processes()


class Component(NamedTuple):
    """A part of the model."""

    name: str
    parameters: int
    trainable: bool


class Peak(NamedTuple):
    """The most memory that one process holds at once, in bytes by part, and when."""

    when: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


class Plan(NamedTuple):
    """Everything that `dylora plan` prints."""

    components: list[Component]
    head: str
    """What the output head is."""
    workload: Workload | None
    not_known: str
    """Why there is no workload; empty where there is one."""
    batch: Batch
    peak: Peak
    """With the flags as they are."""
    peak_bf16: Peak
    """The same run with --bf16."""
    process_bytes: int
    """Python and libraries: resident memory of this process when everything but the model was loaded."""
    checkpoint_bytes: int
    """Experts, router and optimizer state."""
    expert_served_bytes: int
    """One expert in bf16."""
    expert_training_bytes: int
    """One expert while it trains: its weights, their gradients and AdamW's states."""
    processes: Processes = ALONE
    """That train; memory is of one of them."""


def routed_model(arguments: Arguments, *, dtype: torch.dtype | None = None) -> DyLoRAMoE:
    """The model of a run, on the meta device.

    Args:
        dtype: of the base; None: what its config says, else fp32.

    Raises:
        ValueError: where the config cannot be had, or the flags do not fit it.
    """

    def without_weights(name: str, **options: Any) -> PreTrainedModel:
        config = base_config(name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, **{**options, "dtype": dtype or config.dtype or torch.float32}
            )

    return build_model(
        arguments.model, arguments.experts, arguments.router, bf16=arguments.train.bf16, load=without_weights
    )


def components(model: DyLoRAMoE) -> list[Component]:
    """Base, each expert and the router, counted from the model itself; together all of its parameters."""
    base = sum(item.numel() for name, item in model.base.named_parameters() if ".lora_" not in name)
    router = sum(item.numel() for item in model.router.parameters())
    experts = [Component(expert.name, expert.parameters, expert.trainable) for expert in model.experts]
    return [Component("base", base, False), *experts, Component("router", router, True)]


def describe_head(model: DyLoRAMoE) -> str:
    """The output head's size, and whether it is counted once with the embeddings."""
    head = cast(nn.Module, model.base.get_output_embeddings())
    weight = cast(torch.Tensor, cast(Any, head).weight)
    tied = weight is cast(Any, model.base.get_input_embeddings()).weight
    shared = "the embeddings' own matrix, counted once" if tied else "a matrix of its own"
    return f"of the base, the output head has {weight.numel():,} parameters: {shared}"


def peak_memory(arguments: Arguments, load: Workload, *, bf16: bool, processes: Processes = ALONE) -> Peak:
    """The largest moment of one process: the router's start, a training step, or an evaluation.

    On a GPU the router's start is none, for the model is not there yet.

    Args:
        bf16: as with that flag; else as the flags say.
    """
    train = arguments.train
    device = train.device.type
    autocast = torch.bfloat16 if bf16 else torch.float16 if train.fp16 else None
    model = routed_model(arguments, dtype=torch.bfloat16 if bf16 else None)
    if getattr(train, "activation_checkpointing", False) or train.gradient_checkpointing:  # the newer name, the older
        model.gradient_checkpointing_enable()
    one, trained = one_process(model, processes, device=device), trained_bytes(model)
    simulation = Simulation(model, device=device, autocast=autocast)
    simulation.inside(lambda: chunk_loss(model, arguments.model.loss_chunk_size))
    live = simulation.tracker.live
    held = {part: size for part, size in live.items() if part in (BASE, EXPERTS)}
    step = simulation.train_step(
        load.batch, micro_batches=train.gradient_accumulation_steps, label_smoothing=train.label_smoothing_factor
    )
    stages = [
        Peak("a training step", one.holds(step)),
        Peak("an evaluation", one.holds(simulation.evaluation(load.eval_batch))),
    ]
    if device == "cpu":
        # The features of the texts, fp32, once text by text and once behind one another. The base is not shared yet.
        features = 2 * 4 * model.router.hidden_size * load.start_tokens
        stages.append(Peak("the start of the router", {**held, "features of the first rows": features}))
    if processes.sharding is not None:  # when the backward is over
        after = {**held, OPTIMIZER: live[OPTIMIZER], GRADIENTS: trained, FLAT: trained}
        stages.append(Peak("the averaging of gradients", one.holds(after, gathers=False)))
    return max(stages, key=lambda stage: stage.total)


def make_plan(arguments: Arguments, processes: Processes = ALONE) -> Plan:
    """What the run would be. No weights are read or made.

    Raises:
        ValueError: where the model's config cannot be had, or a flag is out of range.
    """
    model = routed_model(arguments)
    parts, head = components(model), describe_head(model)
    trained = trained_bytes(model)
    one = model.experts[0].parameters
    expert_bytes = sum(item.nbytes for item in model.experts.parameters(model.experts[0].name))
    del model
    load, not_known = None, ""
    try:
        load = workload(arguments, num_processes=processes.num)
    except (ValueError, OSError) as error:
        not_known = " ".join(str(error).split())
    process_bytes = resident_bytes()
    train, seq = arguments.train, arguments.data.max_seq_length
    full = Batch(train.per_device_train_batch_size, seq, arguments.data.packing)
    eval_full = Batch(train.per_device_eval_batch_size, seq)
    assumed = load or Workload(0, 0, 0, 0, full, eval_full, ROUTER_START_ROWS * seq)
    peak_bf16 = peak_memory(arguments, assumed, bf16=True, processes=processes)
    return Plan(
        components=parts,
        head=head,
        workload=load,
        not_known=not_known,
        batch=assumed.batch,
        peak=peak_bf16 if train.bf16 else peak_memory(arguments, assumed, bf16=False, processes=processes),
        peak_bf16=peak_bf16,
        process_bytes=process_bytes,
        checkpoint_bytes=(1 + ADAM_STATES) * trained,
        expert_served_bytes=BF16_BYTES * one,
        expert_training_bytes=(2 + ADAM_STATES) * expert_bytes,
        processes=processes,
    )


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def show_plan(arguments: Arguments, num_processes: int = 1) -> None:
    """Print the plan of a run in so many processes.

    Raises:
        ValueError: where it cannot be made; see `make_plan`.
    """
    if arguments.model.load_in_4bit:
        raise ValueError(
            "the memory of a base in 4 bits cannot be estimated yet; leave load_in_4bit out, and count half a byte for "
            "each weight of the base's linears instead of what the plan says"
        )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    processes = processes_of(arguments.train, num_processes)
    plan, console = make_plan(arguments, processes), Console()
    show_components(console, arguments, plan)
    show_workload(console, arguments, plan)
    show_memory(console, arguments, plan)


def show_components(console: Console, arguments: Arguments, plan: Plan) -> None:
    """Component, parameters, memory in bf16, trainable or frozen; then the two shares."""
    asked = arguments.experts
    title = f"{arguments.model.model}, {asked.num_experts} experts of rank {asked.lora_r}"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("component")
    for title in ("parameters", "bf16, MB", "share"):
        table.add_column(title, justify="right")
    table.add_column("")
    total = sum(item.parameters for item in plan.components)

    def add(name: str, parameters: int, kind: str) -> None:
        size, share = BF16_BYTES * parameters / MB, parameters / total
        table.add_row(name, f"{parameters:,}", f"{size:,.2f}", f"{share:.3%}", kind)

    experts = plan.components[1:-1]
    listed = (
        experts if len(experts) <= EXPERTS_LISTED else [experts[0]._replace(name=f"each of {len(experts)} experts")]
    )
    for item in (plan.components[0], *listed, plan.components[-1]):
        add(item.name, item.parameters, "trainable" if item.trainable else "frozen")
    table.add_section()
    for kind, wanted in (("frozen", False), ("trainable", True)):
        add(f"all {kind}", sum(item.parameters for item in plan.components if item.trainable is wanted), "")
    add("everything", total, "")
    console.print(table)
    console.print(plan.head, highlight=False)
    console.print(
        f"one expert: {plan.expert_served_bytes / MB:,.1f} MB served in bf16, "
        f"{plan.expert_training_bytes / MB:,.1f} MB while it trains (weights, gradients, AdamW)\n",
        highlight=False,
    )


def show_workload(console: Console, arguments: Arguments, plan: Plan) -> None:
    """Rows, tokens and steps, or why they are not known."""
    load, train = plan.workload, arguments.train
    if load is None:
        console.print(f"tokens per epoch, steps: not known: {plan.not_known}", highlight=False, markup=False)
    else:
        rows = "packed rows" if load.batch.packed else "rows"
        count = "" if plan.processes.num == 1 else f"{plan.processes.num} x "
        epochs = f"{train.num_train_epochs:g} epochs" if train.max_steps <= 0 else "--max_steps"
        console.print(f"tokens per epoch: {load.tokens:,} in {load.rows:,} {rows}", highlight=False)
        console.print(
            f"steps: {load.steps:,} ({epochs}; {load.steps_per_epoch:,} an epoch, each of "
            f"{count}{train.gradient_accumulation_steps} x {train.per_device_train_batch_size} rows)",
            highlight=False,
        )
    console.print(
        f"a training checkpoint: {plan.checkpoint_bytes / MB:,.1f} MB (experts, router, optimizer state), on disk\n",
        highlight=False,
    )


def show_memory(console: Console, arguments: Arguments, plan: Plan) -> None:
    """The peaks' parts, side by side."""
    batch, train = plan.batch, arguments.train
    columns = [("bf16", plan.peak_bf16)] if train.bf16 else [("as the flags say", plan.peak), ("bf16", plan.peak_bf16)]
    of_one = "" if plan.processes.num == 1 else " of one process"
    title = f"estimated peak{of_one} on {train.device.type}, MB: {batch.rows} rows of {batch.seq} tokens"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("part")
    for name, _ in columns:
        table.add_column(name, justify="right")
    names = [*PARTS, *(name for _, peak in columns for name in peak.parts if name not in PARTS)]
    for name in dict.fromkeys(names):
        if any(peak.parts.get(name) for _, peak in columns):
            table.add_row(name, *(f"{peak.parts.get(name, 0) / MB:,.0f}" for _, peak in columns))
    process = plan.process_bytes if train.device.type == "cpu" else 0
    if process:
        table.add_row("Python and libraries", *(f"{process / MB:,.0f}" for _ in columns))
    table.add_section()
    table.add_row("peak", *(f"{(peak.total + process) / MB:,.0f}" for _, peak in columns), style="bold")
    table.add_row("reached in", *(peak.when for _, peak in columns), style="dim")
    console.print(table)
