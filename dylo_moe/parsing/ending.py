"""How a command of the command line ends: help, a message, or an exit status after a stop."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence

from dylo_moe.utils.errors import RankLost, Stopped
from dylo_moe.utils.harmless import harmless
from dylo_moe.utils.words import nearest


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line asks for help instead of a run."""
    return any(word in ("-h", "--help", "--help_all") for word in words)


def no_such_command(name: str, commands: Collection[str], *, of: str = "") -> str:
    """Say that there is no command of a name, and which is the nearest, or which there are.

    Args:
        of: the command whose sub-commands are meant.
    """
    near = nearest(name, commands)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(commands)}"
    return f"there is no command {f'{of} {name}'.strip()!r}; {hint}"


def print_error(name: str, reason: object) -> None:
    """Print why a command ends, on stderr, and log it; where several processes run the command, one of them does.

    Args:
        name: the command's name; empty for `dylora` itself.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from dylo_moe.utils.distributed import prints_for_all  # late: it needs torch, and one process does not need it

        if not prints_for_all():
            return
    said = harmless(str(reason))
    print(f"{f'dylora {name}'.strip()}: {said}", file=sys.stderr, flush=True)
    logging.getLogger(f"dylo_moe.{name or 'cli'}").error("%s", said)


def until_stopped(name: str, run: Callable[[], object]) -> int:
    """Run a command that saves and exits when a signal asks it to stop, or exits when another process is lost.

    Returns:
        The exit status.
    """
    try:
        run()
    except Stopped as stopped:
        print_error(name, stopped)
        return 128 + stopped.signal
    except RankLost as lost:
        if os.environ.get("DYLORA_TRACEBACK"):
            raise
        print_error(name, lost)
        return 1
    return 0
