"""Commands that run in processes of their own, one after another, and die with whoever started them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

LOCK = ".lock"

LONGEST_WAIT_SECONDS = 180.0
"""For what an earlier call started, which saves as it ends."""

LINE_SECONDS = 30.0
"""Between two lines of progress, where there is no terminal to show it on."""

SET_PARENT_DEATH_SIGNAL = 1
"""Of prctl(2)."""

LIBC = ctypes.CDLL(None, use_errno=True)

_held: list[int] = []
"""Descriptors of the locks that programs inherit, so that a folder stays taken until the last of them has ended."""


@contextmanager
def hold(folder: Path, console: Console) -> Iterator[None]:
    """Inside, nobody else works in a folder.

    Raises:
        ValueError: where somebody does, and goes on doing so.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        started, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - started > LONGEST_WAIT_SECONDS:
                    raise ValueError(f"another comparison is at work in {folder}; wait for it, or end it") from None
                if not told:
                    console.print(f"waiting for what is still at work in {folder}", highlight=False, soft_wrap=True)
                told = True
                time.sleep(0.5)
        _held.append(descriptor)
        try:
            yield
        finally:
            _held.remove(descriptor)
    finally:
        os.close(descriptor)


def run_program(words: Sequence[str], *, log: Path, title: str, console: Console) -> None:
    """Run a command to its end; what it says goes into a file, and its newest line is shown.

    Args:
        words: the command line.
        log: is appended to.
        title: what is shown beside the line.

    Raises:
        ValueError: where it fails, with its last words and where the others are.

    Whatever ends the waiting ends the command, too.
    """
    with open(log, "ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes to us alone, and is passed on once
            pass_fds=_held,
            preexec_fn=_end_with_parent,
        )
    try:
        _watch(process, log, start, title, console)
    except BaseException:
        process.terminate()
        try:
            process.wait()
        except BaseException:  # asked twice
            process.kill()
            process.wait()
            raise
        raise
    if process.returncode != 0:
        last = _last_line(log, start) or "it said nothing"
        raise ValueError(f"{title} failed with status {process.returncode}: {last} (all of it: {log})")


def _watch(process: subprocess.Popen[bytes], log: Path, start: int, title: str, console: Console) -> None:
    shown, told = "", time.monotonic()
    if not console.is_terminal:
        console.print(title, highlight=False, markup=False, soft_wrap=True)
    with console.status(title) as status:
        while process.poll() is None:
            time.sleep(0.2)
            line = _last_line(log, start)
            if line == shown:
                continue
            if console.is_terminal:
                status.update(f"{title}\n{line}".replace("[", "\\["))
                shown = line
            elif time.monotonic() - told > LINE_SECONDS:
                console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
                shown, told = line, time.monotonic()


def _last_line(log: Path, start: int) -> str:
    """The newest line that says something, of what was written from `start` on."""
    with open(log, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end_with_parent() -> None:
    """In the new process: be told to end when whoever started it dies, even by SIGKILL. Linux alone can do that."""
    if sys.platform == "linux":
        LIBC.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
