"""The one process that may write a folder: a lock that dies with it, and a refusal that says who holds it."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from types import TracebackType

from dylo_moe.utils.errors import DyLoRAWarning
from dylo_moe.utils.locks import FileLock, NoLocksError, drop_lock, is_held_here, take_lock

OWNER = ".owner"
"""The locked file in the folder; it says which process holds it, and goes with the end of the work."""


class Owner:
    """Holds the locks of the folders that this process works in, until the end of a `with` block.

    Readers take no lock and are never refused. Of several processes of one run the first takes it for all.
    """

    def __init__(self) -> None:
        self._locks: dict[Path, FileLock | None] = {}
        self._made: list[Path] = []

    def take(self, folder: Path, what: str) -> None:
        """Lock a folder, which is made where there is none; again by the same object changes nothing.

        Args:
            what: what is done in it, for the message, such as "training".

        Raises:
            ValueError: while another process has it.
        """
        place = folder.resolve()
        if place in self._locks or (place.exists() and not place.is_dir()):
            return
        self._made += [path for path in (place, *place.parents) if not path.exists()]
        place.mkdir(parents=True, exist_ok=True)
        try:
            lock = take_lock(place / OWNER)
        except NoLocksError as error:
            text = f"{folder} cannot be locked ({error.strerror}): see to it that no other process is {what} in it"
            warnings.warn(text, DyLoRAWarning, stacklevel=2)
            self._locks[place] = None
            return
        if lock is None:
            raise ValueError(
                f"another process is {what} in {folder}{_holder(place / OWNER)}: wait for it, or end it, or give "
                "another folder"
            )
        os.truncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._locks[place] = lock

    def __enter__(self) -> Owner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the folders; one that was made here, and holds nothing, is removed."""
        for lock in self._locks.values():
            if lock is not None:
                drop_lock(lock)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                continue
        self._locks.clear()


def _holder(path: Path) -> str:
    """Who holds a lock, as the file says; not where it is this very process, whose lock ends if it closes the file."""
    try:
        if is_held_here(path):
            return ""
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return f" ({text[:100]})" if text else ""
