"""Locks on files that die with the process that holds them, however it ends.

They are POSIX record locks: a forked child does not inherit them, so no orphaned worker keeps one, and network file
systems pass them on to their server (NFS 3 with lockd, NFS 4, Lustre with -o flock). Where a file system has none, such
as a bucket that is mounted, other machines cannot be seen.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class NoLocksError(OSError):
    """The file system, or the operating system, has no such locks."""


class FileLock(NamedTuple):
    """A file that this process has locked."""

    path: Path
    descriptor: int
    identity: tuple[int, int]
    """Device and inode."""


_held: set[tuple[int, int]] = set()
"""The files that this process has locked. It may not open them again: closing any descriptor of a file ends its lock,
and a second lock by the same process is granted."""

_mutex = threading.Lock()


def take_lock(path: Path) -> FileLock | None:
    """Lock a file, which is made where there is none; None: somebody holds it, another process or this one.

    Raises:
        NoLocksError: where the file system has no locks.
        OSError: where the file cannot be made.
    """
    if fcntl is None:
        raise NoLocksError(errno.ENOTSUP, "this operating system has no such locks", str(path))
    with _mutex:
        while True:
            if _identity(path) in _held:
                return None
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return None
                raise NoLocksError(error.errno, error.strerror, str(path)) from error
            opened = os.fstat(descriptor)
            if (identity := (opened.st_dev, opened.st_ino)) == _identity(path):
                _held.add(identity)
                return FileLock(path, descriptor, identity)
            os.close(descriptor)  # its holder removed it between the opening and the locking


def drop_lock(lock: FileLock) -> None:
    """Remove a locked file, while it is still locked, and end the lock."""
    with _mutex:
        if _identity(lock.path) == lock.identity:
            lock.path.unlink(missing_ok=True)
        _held.discard(lock.identity)
        os.close(lock.descriptor)


def is_held_here(path: Path) -> bool:
    """Whether this very process has locked a file."""
    return _identity(path) in _held


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of a file that is there; true as well where that cannot be known."""
    try:
        lock = take_lock(path)
    except OSError:
        return True
    if lock is not None:
        with _mutex:
            _held.discard(lock.identity)
            os.close(lock.descriptor)
    return lock is None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
