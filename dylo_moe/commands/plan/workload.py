"""What a run's data amount to: rows, tokens, steps, the longest batch."""

from __future__ import annotations

import math
from typing import NamedTuple

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.train.request import Arguments
from dylo_moe.data.loading import load_data
from dylo_moe.data.packing import PackedTexts, epoch_of
from dylo_moe.training.build import ROUTER_START_ROWS


class Batch(NamedTuple):
    """The largest batch of a run."""

    rows: int
    seq: int
    """Tokens of its longest row."""
    packed: bool = False
    """Whether rows hold several texts."""


class Workload(NamedTuple):
    """The rows, tokens and optimizer steps that the data make."""

    rows: int
    """Rows of an epoch; packed ones where texts are packed."""
    tokens: int
    """Real tokens of an epoch."""
    steps_per_epoch: int
    """Optimizer steps of an epoch."""
    steps: int
    """Optimizer steps of the whole training, unless it stops early."""
    batch: Batch
    """The largest batch of training, in one process."""
    eval_batch: Batch
    start_tokens: int
    """Tokens of the rows that start the router."""


def workload(arguments: Arguments, *, num_processes: int = 1) -> Workload:
    """Read and tokenise the data as training would.

    Args:
        num_processes: that share the rows of a step.

    Raises:
        ValueError, OSError: where the tokenizer or a dataset cannot be had.
    """
    train = arguments.train
    data = load_data(arguments.data, load_tokenizer(arguments.model.model), seed=train.seed)
    rows = epoch_of(data.train, arguments.data)
    lengths = data.train.with_format("numpy")["length"][:]
    packed = isinstance(rows, PackedTexts)
    longest = int(lengths.max())
    if isinstance(rows, PackedTexts):
        longest = max(int(rows.lengths[row].sum()) for row in rows.rows)
    batches = math.ceil(len(rows) / (train.per_device_train_batch_size * num_processes))
    steps_per_epoch = max(math.ceil(batches / train.gradient_accumulation_steps), 1)
    evaluation = data.evaluation.values()
    return Workload(
        rows=len(rows),
        tokens=int(lengths.sum()),
        steps_per_epoch=steps_per_epoch,
        steps=train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * steps_per_epoch),
        batch=Batch(min(train.per_device_train_batch_size, len(rows)), longest, packed),
        eval_batch=Batch(
            min(train.per_device_eval_batch_size, max(len(part) for part in evaluation)),
            max(int(part.with_format("numpy")["length"][:].max()) for part in evaluation),
        ),
        start_tokens=int(lengths[:ROUTER_START_ROWS].sum()),
    )
