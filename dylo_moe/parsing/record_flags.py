"""Record the Trainer's flags that a help shows: python -m dylo_moe.parsing.record_flags

Run it after Transformers was updated in constraints.txt; a test fails until that is done.
"""

from __future__ import annotations

import json
from typing import Any

import transformers
from transformers import TrainingArguments

from dylo_moe.parsing.command_line import SHOWN_FLAGS
from dylo_moe.parsing.help import RECORD, HelpEntry
from dylo_moe.parsing.parser import Parser, plain_options
from dylo_moe.utils.atomic_files import write_json


def record() -> dict[str, Any]:
    """The Trainer's flags that a help shows, from the installed Transformers, in the order of their fields."""
    parser = plain_options(Parser((TrainingArguments,), add_help=False))
    entries = [
        HelpEntry(action.dest, list(action.option_strings), action.nargs, str(action.default), action.help or "")
        for action in parser._actions
        if action.dest in SHOWN_FLAGS
    ]
    return {"transformers": transformers.__version__, "flags": [entry._asdict() for entry in entries]}


if __name__ == "__main__":
    write_json(RECORD, record())
    print(f"{RECORD} has the flags of Transformers {json.loads(RECORD.read_text())['transformers']}")
