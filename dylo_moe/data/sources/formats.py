"""The published formats of datasets, and how a row of each is read into an `Example`.

A format only says which column plays which role, so a format of one's own is a `Columns` too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dylo_moe.data.sources.conversations import read_conversation
from dylo_moe.data.sources.examples import SYSTEM, USER, Example, Fate, Message, RowError, clean_text

NOT_UTF8 = "not UTF-8, as every text must be; convert its file: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
"""The reason for a text in another encoding; its place says the file and the line."""

NOT_UTF8_BUT_UTF16 = "UTF-16, not UTF-8, as every text must be; convert the file: iconv -f UTF-16 -t UTF-8 OLD > NEW"

NOT_TEXT = "not text, so this kind of file is not read; give .jsonl, .json, .csv, .tsv, .parquet or a text"
"""The reason for a file of another kind, such as a workbook, an archive or an image."""


class Columns(NamedTuple):
    """The name of the column that plays each role, or None.

    A format has either `messages`, or `text`, or `prompt` and `response` and optionally `input`, `tests` and `system`.
    """

    system: str | None = None
    prompt: str | None = None
    input: str | None = None
    tests: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None

    @property
    def needed(self) -> list[str]:
        """The columns without which a row gives no example."""
        return [column for column in (self.prompt, self.response, self.messages, self.text) if column is not None]

    def problem(self) -> str | None:
        """The reason why these roles do not form a format; None if they do."""
        given = {role for role in self._fields if getattr(self, role) is not None}
        for main in ({"messages"}, {"text"}, {"prompt", "response"}):
            allowed = main | ({"system", "input", "tests"} if "prompt" in main else set())
            if main <= given <= allowed:
                return None
        return (
            f"the roles {', '.join(sorted(given))} do not form a format; give text, or messages, or prompt and "
            "response (with input, tests or system)"
        )


FORMATS = {
    "chat messages": Columns(messages="messages"),
    "ShareGPT": Columns(messages="conversations"),
    "Alpaca": Columns(prompt="instruction", input="input", response="output"),
    "instruction/response": Columns(prompt="instruction", input="input", response="response"),
    "prompt/response": Columns(prompt="prompt", response="response", system="system"),
    "prompt/completion": Columns(prompt="prompt", response="completion", system="system"),
    "query/answer": Columns(prompt="query", response="answer"),
    "query/response": Columns(prompt="query", response="response"),
    "question/answer": Columns(prompt="question", response="answer"),
    "MBPP": Columns(prompt="text", response="code", tests="test_list"),
    "plain text": Columns(text="text"),
    "plain text (content)": Columns(text="content"),
}
"""The formats that are recognised by their columns, tried in this order; a column `context` is read as `input`."""

_ASKS = ("prompt", "instruction", "query", "question", "response", "completion", "output", "answer")


def recognise(columns: Iterable[str]) -> Columns | None:
    """The format of a row with these columns; None if it is none of FORMATS, or might be two of them."""
    found = set(columns)
    for candidate in FORMATS.values():
        if found.issuperset(candidate.needed):
            if candidate.text is not None and not found.isdisjoint(_ASKS):
                return None
            has_context = candidate.prompt is not None and "context" in found and candidate.input not in found
            return candidate._replace(input="context") if has_context else candidate
    return None


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
    if chosen is None and "chosen" in row and "rejected" in row:
        raise RowError(Fate.MALFORMED, _preference(row))
    if chosen is None:
        names = ", ".join(sorted(str(name)[:40] for name in row)[:12]) or "none"
        raise RowError(Fate.MALFORMED, f"no known format has its columns ({names}); say which to read with --columns")
    if chosen.messages is not None:
        return read_conversation(row, chosen.messages)
    if chosen.text is not None:
        return Example((), _text(row, chosen.text))
    assert chosen.prompt is not None and chosen.response is not None
    parts = [_text(row, chosen.prompt)]
    if more := _optional(row, chosen.input):
        parts.append(more)
    if tests := _tests(row, chosen.tests):
        parts.append(f"The code must pass:\n{tests}")
    context = [Message(USER, "\n\n".join(parts))]
    if system := _optional(row, chosen.system):
        context.insert(0, Message(SYSTEM, system))
    return Example(tuple(context), _text(row, chosen.response))


def _preference(row: dict[str, Any]) -> str:
    """Say that rows of preferences are not trained on as such, and with which columns their chosen answers are."""
    if isinstance(row["chosen"], str):
        columns = "prompt=prompt,response=chosen" if isinstance(row.get("prompt"), str) else "text=chosen"
    else:
        columns = "messages=chosen"
    return (
        "preference data (chosen, rejected), which no command here trains on; to train on the chosen answers alone, "
        f"give --columns {columns}"
    )


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
