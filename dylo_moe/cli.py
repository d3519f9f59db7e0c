"""The command `dylora`: choose the command, run it, and turn a user's mistake into one line."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from dylo_moe.parsing.ending import print_error

COMMANDS = {
    "train": "train several experts and their router together on one frozen model",
    "stream": "learn datasets one after another: what is new grows an expert, and nothing is forgotten",
    "submit": "train on Google Cloud: any flags of train as a job of Vertex AI that resumes after a preemption",
    "plan": "parameters, steps, memory and checkpoint size of a training run, without running it",
    "data": "list datasets, show examples as the model sees them, count the rows that training would use",
    "experts": "the experts of a checkpoint: list them, remove one, fit the gate again",
    "eval": "held-out losses with intervals, and pass@k of HumanEval and MBPP, of a trained model",
    "compare": "ours against the base, single LoRAs of equal size, and routing that is not learned; says if it wins",
    "generate": "continue a prompt with a trained model, each token coloured by the expert it used",
    "export": "an adapter for each expert with the command that serves them, or one plain model; says what that loses",
    "report": "one page about a run or a stream: losses, routing, matrix, settings; it needs no network",
}
"""The summary of each command. `dylo_moe.commands.NAME.main` runs the command; its package is imported only when the
command is typed, so that the overview and the answer to a mistyped command appear at once."""

DESCRIPTION = (
    "One frozen language model, many small LoRA experts, and a router that sends each token to the right ones."
)


def main(argv: Sequence[str] | None = None, **options: Any) -> int:
    """Run one command and return its exit status; a user's mistake ends in one line on stderr and status 2.

    Args:
        options: keyword arguments of the command's own `main`, from a script in its place.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from dylo_moe import __version__

        print(f"dylora {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(COMMANDS)}"
        print(f"dylora: there is no command {name!r}{hint}", file=sys.stderr)
        return 2
    if os.environ.get("WORLD_SIZE", "1") != "1" and name != "train":
        print_error(f"dylora {name}: this command runs in one process; start it without torchrun or accelerate launch")
        return 2
    _silence_other_libraries()
    try:
        return int(importlib.import_module(f"dylo_moe.commands.{name}").main(rest, **options))
    except (ValueError, OSError) as error:
        if os.environ.get("DYLORA_TRACEBACK"):
            raise
        print_error(f"dylora {name}: {error}")
        return 2
    except KeyboardInterrupt:
        print_error(f"dylora {name}: interrupted")
        return 130


def _silence_other_libraries() -> None:
    """Suppress messages of other libraries that a user of the command can do nothing about."""
    # PEFT reads an attribute that Transformers has deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # On some CPUs, bitsandbytes logs at every start that an optional package is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _overview() -> str:
    lines = [DESCRIPTION, "", "usage: dylora COMMAND [--FLAG VALUE ...]", ""]
    lines += [f"  {name:10s} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "`dylora COMMAND --help` explains a command."])


if __name__ == "__main__":
    sys.exit(main())
