"""What other libraries say that nobody can act on: it is kept out of what is printed, here and nowhere else."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dylo_moe.utils.errors import DyLoRAWarning
from dylo_moe.utils.harmless import harmless

SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_SILENT": "true",
}
"""What the libraries read when they are imported. A value of the user's own environment stays."""


USELESS_LINES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "transformers.pipelines.base": "The model 'DyLoRAMoE' is not supported for text-generation",
}
"""Loggers, and how the line of each begins that is dropped."""


def drop_useless_lines() -> None:
    """Drop a line that bitsandbytes, which PEFT imports, logs on every CPU without one more package, and one of
    Transformers' pipeline, which compares the name of the class with a list that has PEFT's and generates all the
    same."""
    for logger in USELESS_LINES:
        logging.getLogger(logger).addFilter(_is_of_use)


@contextmanager
def without_peft_deprecation() -> Iterator[None]:
    """Drop a deprecation in the `with` block: PEFT reads an attribute that Transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


@contextmanager
def without_peft_active_adapter() -> Iterator[None]:
    """Drop a warning in the `with` block: PEFT says which adapter is active now, which a routed model does not use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted", UserWarning)
        yield


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(USELESS_LINES[record.name])


@contextmanager
def only_our_lines(show: Callable[[str], None]) -> Iterator[None]:
    """Keep the messages of other libraries out of a command's output until the `with` block ends.

    Deprecations are for programmers, who see them where they import the package; warnings about anything else stay.

    Args:
        show: called with the text of each warning of ours.
    """
    before = {name: os.environ.get(name) for name in (*SETTINGS, "WANDB_MODE")}
    os.environ.update({name: value for name, value in SETTINGS.items() if before[name] is None})
    if before["WANDB_MODE"] == "offline":  # at this word Transformers prints a line on stdout, and not at its synonym
        os.environ["WANDB_MODE"] = "dryrun"
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # PEFT adapts GPT-2's linears
        theirs = warnings.showwarning

        def show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, DyLoRAWarning):
                show(str(message))
            else:
                theirs(harmless(str(message)), category, *rest, **more)

        warnings.showwarning = show_warning
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})
