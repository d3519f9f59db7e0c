"""What went wrong where files were written, from the errors of the libraries that write them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

OS_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")


@contextmanager
def as_os_errors(path: Path) -> Iterator[None]:
    """Raise OSError where safetensors cannot write within the `with` block; its own error is of a class of its own.

    Args:
        path: what is written.
    """
    try:
        yield
    except SafetensorError as error:
        found = OS_ERROR_NUMBER.search(str(error))
        if found is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def why_not_saved(target: Path, error: Exception) -> str:
    """The reason why a folder cannot be written, in words, with the room that is left there."""
    reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, RuntimeError) and "inline_container" in reason:  # torch.save gives no better reason
        reason = "a file could not be written to its end"
    try:
        return f"{reason}; {shutil.disk_usage(target.parent).free / 1e6:,.0f} MB are free there"
    except OSError:
        return reason
