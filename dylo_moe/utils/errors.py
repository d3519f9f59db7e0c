"""The errors that the command line prints as one line."""

from __future__ import annotations

import signal


class UsageError(ValueError):
    """A mistake on the command line or in a recipe."""


class Stopped(Exception):
    """A run was asked to stop by a signal; `signal` is its number, and the exit status is 128 plus that number."""

    def __init__(self, number: int, text: str = "nothing was trained yet") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {text}")
        self.signal = number


class RankLost(Exception):
    """Another process of the run has ended, so that this one cannot continue."""


class DyLoRAWarning(UserWarning):
    """Something that a user should know, and that does not stop the work; commands print it as a note."""
