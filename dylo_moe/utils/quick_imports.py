"""Imports of large libraries without looking for garbage in between."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Switch the search for garbage off for as long as modules are imported: it takes about a seventh of the time that
    large libraries take to import, and finds next to nothing, because what they make stays."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
