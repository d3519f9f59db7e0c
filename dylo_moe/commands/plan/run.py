"""`dylora plan`: what a training run would be, without a GPU and without any weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from dylo_moe.commands.plan.memory_account import (
    ADAM_STATES,
    ALONE,
    PARTS,
    Component,
    Peak,
    components,
    describe_head,
    peak_memory,
    weights,
)
from dylo_moe.commands.plan.outline import outline
from dylo_moe.commands.plan.per_process import Processes, processes_of
from dylo_moe.commands.plan.workload import Batch, Workload, workload
from dylo_moe.commands.train.request import Arguments
from dylo_moe.training.build import ROUTER_START_ROWS

BF16_BYTES = 2

MB = 1e6

EXPERTS_LISTED = 8
"""Up to so many experts get a line each."""

ON_CPU = (
    "On a CPU the C library may keep more than this (docs/plan.md compares plans with runs). On a GPU Python and "
    "libraries do not count, but the CUDA context and workspaces do. No plan was checked on a GPU."
)
"""Printed below the memory."""

ON_GPU = "The CUDA context and workspaces come on top. No plan was checked on a GPU."


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
    """The memory with the flags as they are."""
    peak_bf16: Peak
    """The memory of the same run with --bf16."""
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


def make_plan(arguments: Arguments, processes: Processes = ALONE) -> Plan:
    """What the run would be. No weights are read or made.

    Raises:
        ValueError: where the model's config cannot be had, or a flag is out of range.
    """
    of = outline(arguments)
    held = weights(of)
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
    peak = peak_memory(of, assumed, processes=processes)
    return Plan(
        components=components(of),
        head=describe_head(of),
        workload=load,
        not_known=not_known,
        batch=assumed.batch,
        peak=peak,
        peak_bf16=peak if train.bf16 else peak_memory(outline(arguments, bf16=True), assumed, processes=processes),
        process_bytes=process_bytes,
        checkpoint_bytes=(1 + ADAM_STATES) * held.trained,
        expert_served_bytes=BF16_BYTES * of.whole.experts[0].parameters,
        expert_training_bytes=(2 + ADAM_STATES) * held.expert,
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
    console.print(ON_CPU if train.device.type == "cpu" else ON_GPU, highlight=False)
