"""`dylora plan`: what a training run would be, without a GPU and without any weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from dylo_moe.base.packaged_models import is_here
from dylo_moe.base.packages import PACKAGED_MODELS
from dylo_moe.commands.plan.arguments import CPU
from dylo_moe.commands.plan.memory_account import (
    ADAM_STATES,
    Component,
    MemoryAccount,
    Peak,
    components,
    describe_head,
    weights,
)
from dylo_moe.commands.plan.outline import outline
from dylo_moe.commands.plan.per_process import Processes, processes_of
from dylo_moe.commands.plan.request import PlanRequest
from dylo_moe.commands.plan.room import FREE_SHARE, GB, Change, Memory, changes, memories
from dylo_moe.commands.plan.workload import Batch, Workload, workload
from dylo_moe.commands.train.request import Arguments
from dylo_moe.evaluation.callback import check_benchmark_flags
from dylo_moe.training.build import ROUTER_START_ROWS
from dylo_moe.training.preflight import flag_problems

BF16_BYTES = 2


class Plan(NamedTuple):
    """Everything that `dylora plan` prints."""

    components: list[Component]
    head: str
    """What the output head is."""
    left_out: str | None
    """What no expert adapts of what was asked for, and why; None: nothing."""
    workload: Workload | None
    not_known: str
    """Why there is no workload; empty where there is one."""
    batch: Batch
    peak: Peak
    """The memory of one process."""
    process_bytes: int
    """Python and libraries: resident memory of this process when everything but the model was loaded; 0 on a GPU."""
    checkpoint_bytes: int
    """Experts, router and optimizer state."""
    expert_served_bytes: int
    """One expert in bf16."""
    expert_training_bytes: int
    """One expert while it trains: its weights, their gradients and AdamW's states."""
    processes: Processes
    """That train; memory is of one of them."""
    memories: list[Memory]
    """That the run may fit into."""
    changes: list[Change]
    """What would take less, where the run fits into none of these."""

    @property
    def total_bytes(self) -> int:
        """The peak of the process, Python and libraries included where they count."""
        return self.peak.total + self.process_bytes


def make_plan(request: PlanRequest) -> Plan:
    """What the run would be. No weights are read or made.

    Raises:
        ValueError: where the model's config cannot be had, or a flag is out of range or cannot apply.
    """
    arguments, device = request.arguments, request.device
    check_flags(arguments)
    processes = processes_of(arguments.train, request.num_processes)
    of = outline(arguments)
    held = weights(of)
    load, not_known = None, ""
    try:
        load = read_workload(arguments, num_processes=processes.num)
    except (ValueError, OSError) as error:
        not_known = " ".join(str(error).split())
    process_bytes = resident_bytes() if device == CPU else 0
    train, seq = arguments.train, arguments.data.max_seq_length
    full = Batch(train.per_device_train_batch_size, seq, arguments.data.packing)
    eval_full = Batch(train.per_device_eval_batch_size, seq)
    assumed = load or Workload(0, 0, 0, 0, full, eval_full, ROUTER_START_ROWS * seq)
    account = MemoryAccount(of, device=device, processes=processes)
    peak = account.peak(assumed)
    sizes, smaller = memories(device, request.memory_gb), []
    if sizes and not sizes[-1].holds(peak.total + process_bytes, device):
        room = (1 - FREE_SHARE[device]) * sizes[-1].gb * GB
        smaller = changes(account, assumed, room=room - process_bytes)
    return Plan(
        components=components(of),
        head=describe_head(of),
        left_out=of.whole.left_out,
        workload=load,
        not_known=not_known,
        batch=assumed.batch,
        peak=peak,
        process_bytes=process_bytes,
        checkpoint_bytes=(1 + ADAM_STATES) * held.trained,
        expert_served_bytes=BF16_BYTES * of.whole.experts[0].parameters,
        expert_training_bytes=(2 + ADAM_STATES) * held.expert,
        processes=processes,
        memories=sizes,
        changes=smaller,
    )


def check_flags(arguments: Arguments) -> None:
    """Raises ValueError for flags that training would refuse, or that cannot be planned."""
    train = arguments.train
    problems = flag_problems(arguments.experts, arguments.router, train)
    if problems:
        raise ValueError("; ".join(problems))
    check_benchmark_flags(
        train.eval_benchmark,
        every=train.eval_benchmark_steps,
        allow_code_execution=train.allow_code_execution,
        sandbox=train.sandbox,
    )
    if arguments.model.load_in_4bit:
        raise ValueError(
            "the memory of a base in 4 bits cannot be estimated yet; leave load_in_4bit out, and count half a byte for "
            "each weight of the base's linears instead of what the plan says"
        )


def read_workload(arguments: Arguments, *, num_processes: int) -> Workload:
    """What the data amount to; the small model, whose tokenizer comes with its weights, is not fetched for it.

    Raises:
        ValueError, OSError: where the tokenizer or a dataset cannot be had.
    """
    base = arguments.model.model
    if base in PACKAGED_MODELS and not is_here(base):
        raise ValueError(f"the tokenizer of {base} comes with the model, which its first training fetches")
    return workload(arguments, num_processes=num_processes)


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
