"""What one of several processes holds: DDP's buckets beside the rest, or of the base a share and what is gathered."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from dylo_moe.base.stack import decoder_layers
from dylo_moe.training.sharding import Sharding, take_sharding
from dylo_moe.training.trainer_arguments import TrainArguments

BASE = "base weights"

BUCKETS = "DDP's copy of the gradients"

GATHERED = "base weights gathered for now"

FLAT = "gradients in one message"
"""The part of a process's memory that several processes can share, and what they add to it."""


class Processes(NamedTuple):
    """Those that train together."""

    num: int = 1
    sharding: Sharding | None = None
    """How they share the base; None: each holds all of it."""


class BaseShare(NamedTuple):
    """Bytes of a base that is shared as `shard_base` does it, in the process that holds the most."""

    whole: int
    """The whole base, over all processes."""
    kept: int
    """The share that this process keeps."""
    gathered: int
    """Whole beside its share, at the most."""


class OneProcess(NamedTuple):
    """How the memory of one of several processes differs from that of a process which is alone."""

    buckets: int
    """DDP's, in bytes; 0 without it."""
    base: BaseShare | None
    """None: all of the base, always."""

    def holds(self, alone: dict[str, int], *, gathers: bool = True) -> dict[str, int]:
        """The bytes of a moment by part, from those of a process which is alone.

        Args:
            gathers: whether layers run then.
        """
        if self.base is None:
            return {**alone, BUCKETS: self.buckets}
        kept = alone[BASE] - self.base.whole + self.base.kept
        return {**alone, BASE: kept, GATHERED: self.base.gathered if gathers else 0}


def processes_of(train: TrainArguments, num_processes: int) -> Processes:
    """So many processes, which share the base as the flags say; `train` loses these flags, as when it trains.

    Raises:
        ValueError: for flags of FSDP that cannot apply.
    """
    if train.fsdp and num_processes == 1:
        raise ValueError(
            "fsdp shares the base among several processes, and num_processes is 1; "
            "say how many will train (--num_processes 8), or leave fsdp out"
        )
    return Processes(num_processes, take_sharding(train, num_processes=num_processes))


def one_process(base: PreTrainedModel, processes: Processes, *, trained: int, device: str) -> OneProcess:
    """One of these, which train experts on the base.

    Args:
        trained: bytes of the weights that have gradients, which take as much.
        device: where: "cpu", or a GPU's kind.
    """
    if processes.sharding is None:
        return OneProcess(trained if processes.num > 1 else 0, None)
    how = processes.sharding
    share = base_share(base, processes.num, reshard_after_forward=how.reshard_after_forward)
    in_host = how.cpu_offload and device != "cpu"
    return OneProcess(0, share._replace(kept=0) if in_host else share)


def base_share(base: PreTrainedModel, num_processes: int, *, reshard_after_forward: bool) -> BaseShare:
    """What `shard_base` would leave one of so many processes of a base; weights need not be there.

    Every tensor is cut along its first dimension into pieces of one length, of which the last may be padding. What is
    in no decoder layer (embeddings, norm, head) is gathered for a whole step; of the layers two are, the one at work
    and the next, or all where they stay after their forward.
    """
    layers = sorted(sum(item.nbytes for item in _own(layer)) for layer in decoder_layers(base)[1])
    whole = sum(item.nbytes for item in _own(base))
    kept = sum(math.ceil(len(item) / num_processes) * (item.nbytes // len(item)) for item in _own(base))
    at_once = layers[-2:] if reshard_after_forward else layers
    return BaseShare(whole, kept, whole - sum(layers) + sum(at_once))


def _own(module: nn.Module) -> list[Tensor]:
    """The base's weights in a module of it; tied ones once."""
    return [parameter for name, parameter in module.named_parameters() if ".lora_" not in name]
