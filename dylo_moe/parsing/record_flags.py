"""Record the Trainer's flags that a help shows: python -m dylo_moe.parsing.record_flags

Run it after Transformers was updated in constraints.txt; a test fails until that is done.
"""

from __future__ import annotations

import json
from typing import Any

import transformers
from transformers import TrainingArguments

from dylo_moe.parsing.command_line import SHOWN_FLAGS
from dylo_moe.parsing.help import RECORD
from dylo_moe.parsing.help_format import default_in_words
from dylo_moe.parsing.parser import Parser, plain_options
from dylo_moe.utils.atomic_files import write_json


def record() -> dict[str, Any]:
    """The Trainer's flags that a help shows, from the installed Transformers, in the order of their fields."""
    parser = plain_options(Parser((TrainingArguments,), add_help=False))
    flags = [
        {
            "name": action.dest,
            "options": list(action.option_strings),
            "nargs": action.nargs,
            "default": default_in_words(action.default),
            "choices": None if action.choices is None else list(map(str, action.choices)),
            "is_switch": parser.is_switch(action.option_strings[0]),
        }
        for action in parser._actions
        if action.dest in SHOWN_FLAGS
    ]
    return {"transformers": transformers.__version__, "flags": flags}


if __name__ == "__main__":
    write_json(RECORD, record())
    print(f"{RECORD} has the flags of Transformers {json.loads(RECORD.read_text())['transformers']}")
