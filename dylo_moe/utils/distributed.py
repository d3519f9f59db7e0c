"""Runs of several processes: what rank 0 does alone, and what all ranks have to agree on.

The processes are started by `torchrun` or `accelerate launch`. In a single process each function here does nothing, or
what a run of one rank means by it.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from dylo_moe.utils.screen import Screen

STORE_TIMEOUT = timedelta(seconds=10)
"""How long a rank tries to reach the launcher's store."""

WORK_TIMEOUT = timedelta(hours=1)
"""How long ranks wait for a result of rank 0, such as a download."""

_CALLS = itertools.count()


def num_ranks() -> int:
    """The number of processes of the run; before they are joined, it is the one that the launcher states."""
    return distributed.get_world_size() if _is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that prints, and writes files."""
    return (distributed.get_rank() if _is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def are_joined() -> bool:
    """Whether there are other processes and this one is connected to them."""
    return _is_initialized() and distributed.get_world_size() > 1


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def screen(area: str) -> Screen:
    """A screen that prints and logs on rank 0 alone, so that nothing is said twice."""
    return Screen(area, is_first=is_first())


def from_first(make: Callable[[], str]) -> str:
    """What `make` returns on the first rank, which alone calls it; also before the ranks are joined.

    Raises:
        ValueError, OSError: on the first rank, as `make` raises them; on the others a ValueError that says the same.
    """
    if num_ranks() == 1:
        return make()
    store, key = _store(), f"dylora/first/{next(_CALLS)}"
    store.set_timeout(WORK_TIMEOUT)
    if is_first():
        try:
            made = make()
        except (ValueError, OSError) as error:
            store.set(key, json.dumps({"error": str(error)}))
            raise
        store.set(key, json.dumps({"made": made}))
        return made
    told = json.loads(store.get(key))
    if "error" in told:
        raise ValueError(told["error"])
    return told["made"]


def first_does(work: Callable[[], object]) -> None:
    """Have the first rank alone do some work, while the others wait for it.

    Raises:
        ValueError, OSError: as `from_first`.
    """

    def done() -> str:
        work()
        return ""

    from_first(done)


def value_of_first(value: Any) -> Any:
    """The first rank's value, on every rank; it is pickled on the way."""
    if not are_joined():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give tensors the bits that they have on the first rank; those that have them already are not written to.

    Args:
        tensors: on every rank as many, of the same shapes and in the same order.
    """
    if not are_joined():
        return
    for tensor in tensors:
        sent = tensor.detach().to(_device(), copy=True)
        distributed.broadcast(sent, src=0)
        sent = sent.to(tensor.device)
        if not torch.equal(sent, tensor):
            tensor.copy_(sent)


def largest(number: int) -> int:
    """The largest of all ranks' values."""
    if not are_joined():
        return number
    numbers = torch.tensor(number, device=_device())
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    return int(numbers)


def differing(value: Any) -> list[int]:
    """The ranks whose value differs from that of rank 0."""
    if not are_joined():
        return []
    values: list[Any] = [None] * num_ranks()
    distributed.all_gather_object(values, value)
    return [index for index, other in enumerate(values) if other != values[0]]


def leave() -> None:
    """The run is over."""
    if are_joined():
        distributed.destroy_process_group()


def prints_for_all() -> bool:
    """Whether this process prints why the run ends: of several that fail, the first to call this function does."""
    if num_ranks() == 1:
        return True
    try:
        return _store().add("dylora/told", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # the launcher has no store, or has ended
        return is_first()


def _store() -> distributed.PrefixStore:
    """The launcher's store, which all ranks of one start share."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, timeout=STORE_TIMEOUT)
    return distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank has ended or does not answer."""
    if num_ranks() == 1 or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    signs = ("closed by peer", "reset by peer", "broken pipe", "timed out waiting")
    return isinstance(error, distributed.DistError) or any(sign in text for sign in signs)


def _device() -> torch.device:
    """The device of tensors that are sent to other ranks."""
    if "gloo" in str(distributed.get_backend()):  # also beside another one
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
