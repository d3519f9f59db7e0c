"""Run commands in separate processes, one after another; they end when the process that started them ends."""

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

from rich.text import Text

from dylo_moe.utils.screen import SECONDS_BETWEEN_LINES, Screen

LOCK = ".lock"

LONGEST_WAIT_SECONDS = 180.0
"""The longest wait for a process that an earlier, killed call has started, and which saves before it ends."""

SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""

LIBC = ctypes.CDLL(None, use_errno=True)

_held: list[int] = []
"""Descriptors of the locks, which programs inherit, so that a folder stays locked until the last of them has ended."""


@contextmanager
def hold(folder: Path, screen: Screen) -> Iterator[None]:
    """Lock a folder against other comparisons.

    Raises:
        ValueError: where another comparison holds the lock for longer than `LONGEST_WAIT_SECONDS`.
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
                    raise ValueError(f"another comparison is running in {folder}; wait for it, or end it") from None
                if not told:
                    screen.say(f"waiting for a process that still runs in {folder}")
                told = True
                time.sleep(0.5)
        _held.append(descriptor)
        try:
            yield
        finally:
            _held.remove(descriptor)
    finally:
        os.close(descriptor)


def run_program(words: Sequence[str], *, log: Path, title: str, screen: Screen) -> None:
    """Run a command to its end; its output is appended to a file, and its newest line is shown.

    An exception that ends the wait, such as one from a signal, ends the command too.

    Args:
        words: the command line.
        log: the file of the output.
        title: the text that is shown beside the newest line.

    Raises:
        ValueError: where the command fails, with its last line and the file with all of them.
    """
    with open(log, "ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C then reaches this process alone, which ends the command once
            pass_fds=_held,
            preexec_fn=_end_with_parent,
        )
    try:
        _watch(process, log, start, title, screen)
    except BaseException:
        process.terminate()
        try:
            process.wait()
        except BaseException:  # a second signal: do not wait for the command to save
            process.kill()
            process.wait()
            raise
        raise
    if process.returncode != 0:
        last = _last_line(log, start) or "it printed nothing"
        raise ValueError(f"{title} failed with status {process.returncode}: {last} (whole output: {log})")


def _watch(process: subprocess.Popen[bytes], log: Path, start: int, title: str, screen: Screen) -> None:
    shown, told = "", time.monotonic()
    with screen.status(title) as status:
        while process.poll() is None:
            time.sleep(0.2)
            line = _last_line(log, start)
            if line == shown:
                continue
            if status is not None:
                status.update(Text(f"{title}\n{line}"))
                shown = line
            elif time.monotonic() - told >= SECONDS_BETWEEN_LINES:
                screen.progress(f"  {line}")
                shown, told = line, time.monotonic()


def _last_line(log: Path, start: int) -> str:
    """The newest line that is not blank, of those written from byte `start` on; it looks at the last 4 KiB."""
    with open(log, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end_with_parent() -> None:
    """Ask the kernel, in the new process, to send SIGTERM when the parent ends, even by SIGKILL; only Linux can."""
    if sys.platform == "linux":
        LIBC.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
