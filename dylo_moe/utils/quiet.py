"""Whether commands print only warnings, errors and their answer: the flag --quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IS_QUIET: ContextVar[bool] = ContextVar("is_quiet", default=False)


def is_quiet() -> bool:
    """Whether a `Screen` that is made now is quiet."""
    return _IS_QUIET.get()


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Make the screens of a `with` block quiet, or not."""
    token = _IS_QUIET.set(wanted)
    try:
        yield
    finally:
        _IS_QUIET.reset(token)
