"""Whether a run fits into a memory, and what to change where it does not: only changes whose memory was estimated."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dylo_moe.commands.plan.arguments import CPU
from dylo_moe.commands.plan.memory_account import MemoryAccount, Settings, settings_of_flags
from dylo_moe.commands.plan.outline import outline
from dylo_moe.commands.plan.workload import Workload
from dylo_moe.training.trainer_arguments import TrainArguments
from dylo_moe.utils.host_memory import host_bytes

CARDS_GB = (16.0, 24.0, 40.0, 80.0)
"""The memory of usual GPUs."""

GB = 1e9

FREE_SHARE = {"cuda": 0.1, CPU: 0.25}
"""The share of the memory that is left free. On a GPU it is a guess, for the CUDA context, workspaces and the
allocator's rounding; on a CPU it is for what the C library keeps of freed blocks (docs/plan.md has measurements)."""

FREE_WORDS = {"cuda": "a tenth is left free", CPU: "a quarter is left free"}

SHORTEST = 128
"""Rows of no more tokens are not proposed to be cut."""


class Memory(NamedTuple):
    """A memory that a run may fit into."""

    gb: float
    name: str
    """In words, such as "24 GB"."""

    def holds(self, num_bytes: float, device: str) -> bool:
        """Whether so many bytes leave the share free that a device needs."""
        return num_bytes <= (1 - FREE_SHARE[device]) * self.gb * GB


class Change(NamedTuple):
    """Flags that would make a run smaller, and its memory with them."""

    flags: tuple[str, ...]
    """Each with its value."""
    num_bytes: int
    """The peak with them."""


def memories(device: str, asked_gb: float | None) -> list[Memory]:
    """The memories that a plan speaks of, the smallest first: the one asked for, that of this machine, or usual cards.

    Empty where the system does not say how much memory it has.
    """
    if asked_gb is not None:
        return [Memory(asked_gb, f"{asked_gb:g} GB")]
    if device != CPU and not torch.cuda.is_available():
        return [Memory(size, f"{size:g} GB") for size in CARDS_GB]
    size = host_bytes() if device == CPU else torch.cuda.get_device_properties(0).total_memory
    whose = "this machine" if device == CPU else "the GPU of this machine"
    return [Memory(size / GB, f"the {size / GB:,.1f} GB of {whose}")] if size else []


def changes(account: MemoryAccount, load: Workload, *, room: float) -> list[Change]:
    """What could be changed so that a run takes less, each on its own and with all other flags as they are; and, where
    none of them is enough, all that keep what is trained on at once.

    Args:
        account: of the run.
        load: with its batches.
        room: bytes that the peak may take.
    """
    train, settings, found = account.outline.arguments.train, settings_of_flags(account.outline), []
    half = account
    if account.outline.autocast is None:
        half = MemoryAccount(
            outline(account.outline.arguments, bf16=True),
            device=account.device,
            processes=account.processes,
            like=account,
        )
        found.append(Change(("--bf16",), half.peak(load).total))
    if not settings.checkpointing:
        again = account.peak(load, settings._replace(checkpointing=True))
        found.append(Change(("--gradient_checkpointing",), again.total))
    least = [flag for change in found for flag in change.flags]
    found += smaller_batches(account, load, settings, room=room)
    if all(change.num_bytes > room for change in found):
        rows = load.batch.rows
        if rows > 1:
            least += _rows_flags(train, 1, rows)
        single = load._replace(batch=load.batch._replace(rows=1))
        if tuple(least) not in [(), *(change.flags for change in found)]:
            peak = half.peak(single, Settings(True, settings.accumulates or rows > 1))
            found.append(Change(tuple(least), peak.total))
    return found


def smaller_batches(account: MemoryAccount, load: Workload, settings: Settings, *, room: float) -> list[Change]:
    """The largest batch that fits, with as much accumulation as keeps the rows of a step, or that of one row where none
    does; and rows of half the length. Only what a batch allows."""
    rows, seq = load.batch.rows, load.batch.seq
    if rows == 1:
        return [_shorter(seq, account.peak(_halved(load), settings).total)] if seq > SHORTEST else []
    ends = load.batch._replace(rows=1), load.batch
    accumulated = settings._replace(accumulates=True)
    sizes = {}
    for count in (count for count in range(1, rows) if rows % count == 0):
        fewer = load.batch._replace(rows=count)
        account.assume(fewer, ends, count, checkpointing=settings.checkpointing)
        sizes[count] = account.peak(load._replace(batch=fewer), accumulated).total
    count = max((count for count, size in sizes.items() if size <= room), default=1)
    found = [Change(_rows_flags(account.outline.arguments.train, count, rows), sizes[count])]
    if seq > SHORTEST:
        shorter = _halved(load)
        # Half as many tokens compute what half the rows do, and their masks are smaller.
        account.assume(shorter.batch, ends, rows / 2, checkpointing=settings.checkpointing)
        found.append(_shorter(seq, account.peak(shorter, settings).total))
    return found


def _halved(load: Workload) -> Workload:
    """The same with rows of half the length."""
    seq = load.batch.seq // 2
    evaluated = load.eval_batch._replace(seq=min(load.eval_batch.seq, seq))
    return load._replace(batch=load.batch._replace(seq=seq), eval_batch=evaluated)


def _shorter(seq: int, num_bytes: int) -> Change:
    return Change((f"--max_seq_length {seq // 2}",), num_bytes)


def _rows_flags(train: TrainArguments, count: int, rows: int) -> tuple[str, str]:
    steps = train.gradient_accumulation_steps * rows // count
    return f"--per_device_train_batch_size {count}", f"--gradient_accumulation_steps {steps}"
