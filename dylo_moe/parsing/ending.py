"""How a command of the command line ends: help, a message, or an exit status after a stop."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from dylo_moe.utils.errors import RankLost, Stopped


def asks_for_help(words: list[str]) -> bool:
    """Whether a command line asks for help instead of a run."""
    return any(word in ("-h", "--help", "--help_all") for word in words)


def print_error(text: str) -> None:
    """Print why a command ends, on stderr; where several processes run the command, one of them prints it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from dylo_moe.utils.distributed import prints_for_all  # late: it needs torch, and one process does not need it

        if not prints_for_all():
            return
    print(text, file=sys.stderr, flush=True)


def until_stopped(name: str, run: Callable[[], object]) -> int:
    """Run a command that saves and exits when a signal asks it to stop, or exits when another process is lost.

    Returns:
        The exit status.
    """
    try:
        run()
    except Stopped as stopped:
        print_error(f"dylora {name}: {stopped}")
        return 128 + stopped.signal
    except RankLost as lost:
        if os.environ.get("DYLORA_TRACEBACK"):
            raise
        print_error(f"dylora {name}: {lost}")
        return 1
    return 0
