"""Commands run in processes that are forked from the test's own, which has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from dylo_moe.cli import main


def forked(
    words: list[str], log: Path, *, count: int = 1, interrupt: Callable[[list[int]], None] | None = None
) -> list[int]:
    """Run a command in one process, or in several as a launcher would start them.

    Args:
        log: where everything that they print is added.
        interrupt: is given the processes' ids once they run.

    Returns:
        Their exit codes.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_run, args=(number, count, store.port, words, log)) for number in range(count)]
    for process in processes:
        process.start()
    if interrupt is not None:
        interrupt([process.pid for process in processes])
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


def signal_when(
    there: Callable[[], bool], number: int, *, which: slice = slice(None)
) -> Callable[[Sequence[int]], None]:
    """Make an `interrupt` that waits until something is there, and then sends a signal to some of the processes."""

    def interrupt(ids: Sequence[int]) -> None:
        limit = time.monotonic() + 100
        while not there() and time.monotonic() < limit:
            time.sleep(0.01)
        for process in ids[which]:
            os.kill(process, number)

    return interrupt


def _run(number: int, count: int, port: int, words: list[str], log: Path) -> None:
    torch.set_num_threads(1)  # a fork has no more of the parent's threads, which it would wait for
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout = sys.stderr = os.fdopen(said, "a", buffering=1)
    if count > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ.update(address, RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count))
    AcceleratorState._reset_state(reset_partial_state=True)
    os._exit(main(words))
