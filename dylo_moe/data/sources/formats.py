"""How a row of a dataset is read into an `Example`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dylo_moe.data.sources.conversations import read_conversation
from dylo_moe.data.sources.examples import ASSISTANT, SYSTEM, USER, Example, Fate, Message, RowError, clean_text
from dylo_moe.data.sources.roles import Columns, holds_something, label_problem, recognise, why_not_recognised

NOT_UTF8 = "not UTF-8, as every text must be; convert its file: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
"""The reason for a text in another encoding; its place says the file and the line."""

NOT_UTF8_BUT_UTF16 = "UTF-16, not UTF-8, as every text must be; convert the file: iconv -f UTF-16 -t UTF-8 OLD > NEW"

NOT_TEXT = "not text, so this kind of file is not read; give .jsonl, .json, .csv, .tsv, .parquet or a text"
"""The reason for a file of another kind, such as a workbook, an archive or an image."""


def parse_json(line: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises RowError for anything else."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise RowError(Fate.MALFORMED, NOT_UTF8) from None
    except json.JSONDecodeError as error:
        raise RowError(Fate.MALFORMED, f"not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise RowError(Fate.MALFORMED, "not JSON") from None
    if not isinstance(row, dict):
        raise RowError(Fate.MALFORMED, "not a JSON object")
    return row


def read_row(row: dict[str, Any], columns: Columns | None) -> Example:
    """Read the example that a row holds.

    Args:
        columns: which columns to read; None: the row is recognised by its own columns.

    Raises:
        RowError: for a row without a text to learn, or in another format.
    """
    chosen = columns or recognise(row)
    if chosen is None:
        raise RowError(Fate.MALFORMED, why_not_recognised(row))
    if chosen.text is not None:
        return Example((), _text(row, chosen.text))
    if chosen.messages is not None:
        return _with_earlier(row, chosen, read_conversation(row, chosen.messages))
    assert chosen.prompt is not None and chosen.response is not None
    if isinstance(row.get(chosen.prompt), list):
        return _with_earlier(row, chosen, _asked_in_turns(row, chosen, chosen.prompt, chosen.response))
    parts = [_text(row, chosen.prompt)]
    if more := _optional(row, chosen.input):
        parts.append(more)
    if tests := _tests(row, chosen.tests):
        parts.append(f"The code must pass:\n{tests}")
    if problem := label_problem(row, chosen):
        raise RowError(Fate.MALFORMED, problem)
    return _with_earlier(row, chosen, Example((Message(USER, "\n\n".join(parts)),), _text(row, chosen.response)))


def _asked_in_turns(row: dict[str, Any], columns: Columns, prompt: str, response: str) -> Example:
    """A prompt that is a conversation, and its response, as TRL has them: answers in the prompt are only read."""
    asked = [{**message, "weight": 0} if isinstance(message, dict) else message for message in row[prompt]]
    said = row.get(response)
    answer = said if isinstance(said, list) else [{"role": ASSISTANT, "content": _text(row, response)}]
    whole = f"{prompt} and {response}"
    example = read_conversation({**row, whole: [*asked, *answer]}, whole)
    besides = [name for name in (columns.input, columns.tests) if name and holds_something(row.get(name))]
    notes = [example.note, *(f"its {name} is not read, for its {prompt} is a conversation" for name in besides)]
    context = tuple(turn if turn.role == ASSISTANT else turn._replace(trained=True) for turn in example.context)
    return example._replace(context=context, note="; ".join(filter(None, notes)))


def _with_earlier(row: dict[str, Any], columns: Columns, example: Example) -> Example:
    """Put the turns of the history and the system message before an example.

    Of several system messages that of the conversation is read, else that of the history, else that of the column.
    """
    earlier, history_note = _history(row, columns.history)
    systems: dict[str, Message] = {}
    turns: list[Message] = []
    for name, messages in ((columns.messages, example.context), (columns.history, earlier)):
        has_system = bool(messages) and messages[0].role == SYSTEM
        if has_system:
            systems[str(name)] = messages[0]
        turns = [*messages[has_system:], *turns]
    if written := _optional(row, columns.system):
        systems[str(columns.system)] = Message(SYSTEM, written)
    read, *others = systems or [""]
    notes = [example.note, history_note]
    notes += [
        f"its system message in {name} is not read, for {read} has another one"
        for name in others
        if systems[name] != systems[read]
    ]
    system = [systems[read]] if systems else []
    return example._replace(context=(*system, *turns), note="; ".join(filter(None, notes)))


def _history(row: dict[str, Any], column: str | None) -> tuple[list[Message], str]:
    """The turns before a question, as pairs [question, answer] or as messages, and a remark about what is left out."""
    turns = None if column is None else row.get(column)
    if column is None or turns is None or turns == [] or (isinstance(turns, str) and not turns.strip()):
        return [], ""
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RowError(Fate.MALFORMED, f"{column} is not a list of [question, answer] pairs or of messages")
    if isinstance(turns[0], dict):
        example = read_conversation(row, column)
        return [*example.messages], example.note
    earlier = []
    for pair in turns:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowError(Fate.MALFORMED, f"{column} is not a list of [question, answer] pairs or of messages")
        question, answer = pair
        earlier.append(Message(USER, clean_text(question, f"a question of {column}")))
        earlier.append(Message(ASSISTANT, clean_text(answer, f"an answer of {column}")))
    return earlier, ""


def _text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise RowError(Fate.MALFORMED, f"no {column}")
    return clean_text(row[column], column)


def _optional(row: dict[str, Any], column: str | None) -> str:
    """The column's text; an empty string if it is missing, null or blank."""
    value = None if column is None else row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return clean_text(value, str(column))


def _tests(row: dict[str, Any], column: str | None) -> str:
    value = None if column is None else row.get(column)
    if value is None or isinstance(value, str):
        return _optional(row, column)
    if not isinstance(value, Sequence):
        raise RowError(Fate.MALFORMED, f"{column} is neither a string nor a list of strings")
    return "\n".join(clean_text(test, f"a test of {column}") for test in value)
