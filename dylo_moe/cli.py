"""The command `dylora`: choose the command, run it, and turn a user's mistake into one line."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from dylo_moe.parsing.ending import no_such_command, print_error
from dylo_moe.parsing.help_format import overview
from dylo_moe.utils.failures import REPORT, explained
from dylo_moe.utils.harmless import harmless
from dylo_moe.utils.other_libraries import only_our_lines
from dylo_moe.utils.quiet import quiet

SEVERAL_PROCESSES = ("train", "stream")
"""The commands that a launcher may start in several processes."""

QUIET = "--quiet"
"""The flag of every command, wherever it stands: only warnings, errors, and the answer or the result's path."""

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
    "report": "one page about a run, a stream or a comparison: losses, routing, verdicts; it needs no network",
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
    typed = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in typed if word != QUIET]
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(overview("dylora COMMAND [--FLAG VALUE ...]", COMMANDS, description=DESCRIPTION))
        return 0
    if words[0] in ("--version", "version") or words[1:] == ["--version"]:
        from dylo_moe import __version__

        print(f"dylora {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        print_error("", no_such_command(name, COMMANDS))
        return 2
    if os.environ.get("WORLD_SIZE", "1") != "1" and name not in SEVERAL_PROCESSES:
        print_error(name, "this command runs in one process; start it without torchrun or accelerate launch")
        return 2
    with quiet(QUIET in typed), only_our_lines(functools.partial(_show_note, name)):
        return _run(name, rest, options)


def _run(name: str, words: list[str], options: dict[str, Any]) -> int:
    try:
        return int(importlib.import_module(f"dylo_moe.commands.{name}").main(words, **options))
    except KeyboardInterrupt:
        print_error(name, "interrupted")
        return 130
    except Exception as error:
        if os.environ.get("DYLORA_TRACEBACK"):
            raise
        message = explained(error, name)
        if message is None:
            sys.stderr.write(harmless(traceback.format_exc()))
            print_error(name, REPORT)
            return 1
        print_error(name, message)
        return 2


def _show_note(name: str, sentence: str) -> None:
    from dylo_moe.utils.screen import Screen  # late: it needs rich, and the help does not

    Screen(name).note(sentence)


if __name__ == "__main__":
    sys.exit(main())
