"""State that every thread has its own of."""

from __future__ import annotations

import threading
from typing import Any


class PerThread(threading.local):
    """An object whose attributes each thread has its own of: in each they begin as a subclass's `__init__`, which takes
    no arguments, makes them. A copy, also one made by pickling, begins anew in every thread."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
