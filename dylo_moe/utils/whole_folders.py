"""Folders that are there whole or not at all: written aside, then put in place of an older one, whatever interrupts it.

PARENT/NAME                 the folder
PARENT/.NAME.RANDOM/new     what is being written; after the exchange the older folder, which is deleted
PARENT/.NAME.RANDOM/old     the older folder, for a moment, where the system cannot exchange two folders at once
PARENT/.NAME.RANDOM/lock    locked by the process that writes, as long as it lives
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dylo_moe.utils.atomic_files import sync
from dylo_moe.utils.locks import FileLock, NoLocksError, drop_lock, is_held, take_lock

NEW, OLD, LOCK = "new", "old", "lock"

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of renameat2(2)."""

CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV}
"""What renameat2 says on kernels and file systems that cannot exchange two folders: NFS, FUSE, some overlays."""


@contextmanager
def written_aside(target: Path, *, within: Path | None = None) -> Iterator[Path]:
    """Yield a new folder for what will be `target`; afterwards its hidden parent is removed, with all that is in it.

    What earlier, killed calls have left of the same target is taken up or removed first.

    Args:
        within: the folder of the hidden parent; by default that of the target, which is on the same file system.
    """
    clear_killed(target, within=within)
    hidden, lock = _hidden_folder(target, target.parent if within is None else within)
    try:
        (hidden / NEW).mkdir()
        yield hidden / NEW
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if lock is not None:
            drop_lock(lock)


def _hidden_folder(target: Path, parent: Path) -> tuple[Path, FileLock | None]:
    while True:
        hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
        try:
            return hidden, take_lock(hidden / LOCK)
        except NoLocksError:
            return hidden, None
        except FileNotFoundError:  # another process took the empty folder for a leftover
            continue


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` to write into; it becomes `target` if the body succeeds, and is removed if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(target) as aside:
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors keeps its files from all other users, such as a server's
                sync(path)
        replace_folder(aside, target)


def replace_folder(aside: Path, target: Path) -> None:
    """Put the folder `aside` in the place of `target`, where a folder may be.

    The two are exchanged at once where the system can do that, and what was there is then at `aside`. Elsewhere it is
    moved to `old` beside `aside` first, where `left_by_kill` finds it if a kill comes between the two.
    """
    os.chmod(aside, 0o755)
    if not target.exists():
        os.rename(aside, target)
        return
    if exchange(aside, target):
        return
    older = aside.with_name(OLD)
    os.rename(target, older)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(older, target)
        raise


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step that nothing can interrupt; False: this system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


# What a killed process has left.


def hidden_of(target: Path, within: Path | None = None) -> list[Path]:
    """The hidden folders in which a folder was or is being written, oldest first."""
    parent = target.parent if within is None else within
    name = re.compile(rf"\.{re.escape(target.name)}\.([a-z0-9_]{{8}}|old\.[a-z0-9_]{{8}}|partial)")
    found = [path for path in parent.iterdir() if name.fullmatch(path.name)] if parent.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=lambda path: path.stat().st_mtime)


def left_by_kill(target: Path) -> Path | None:
    """Where a folder is that a killed process had moved aside to replace it; None where it is in its place, or nowhere.

    Earlier versions moved it to `.NAME.old.RANDOM/checkpoint`.
    """
    if target.exists():
        return None
    moved = [hidden / name for hidden in hidden_of(target) for name in (OLD, "checkpoint") if (hidden / name).is_dir()]
    return moved[-1] if moved else None


def clear_killed(target: Path, *, within: Path | None = None) -> list[str]:
    """Put a folder back that a killed process had moved aside, and delete what such processes left; returns the names.

    What a living process writes is left alone.
    """
    names = []
    for hidden in hidden_of(target, within):
        inside = {path.name for path in hidden.iterdir()}
        if not inside <= {NEW, OLD, LOCK} and not (inside == {"checkpoint"} and ".old." in hidden.name):
            continue  # not of this kind
        if LOCK in inside and is_held(hidden / LOCK):
            continue
        if within is None and left_by_kill(target) in {hidden / OLD, hidden / "checkpoint"}:
            os.rename(hidden / OLD if OLD in inside else hidden / "checkpoint", target)
        shutil.rmtree(hidden, ignore_errors=True)
        names.append(hidden.name)
    return names
