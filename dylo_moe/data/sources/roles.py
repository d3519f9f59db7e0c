"""Which column of a row plays which role, recognised by the columns' names, and which columns nothing reads.

A format only says which column plays which role, so a format of one's own is a `Columns` too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "chat")
"""The columns that hold a conversation."""

ASKING = ("instruction", "prompt", "query", "question", "problem", "input", "inputs")
"""The columns that hold a question; `input` beside another one is the text that the question is about."""

ANSWERING = ("output", "response", "completion", "answer", "solution", "target", "targets")
"""The columns that hold an answer."""

OTHER_PAIRS = (
    *(("text", "code"), ("prompt", "code"), ("instruction", "code")),
    *(("text", "summary"), ("article", "summary"), ("document", "summary"), ("dialogue", "summary")),
    *(("article", "highlights"), ("source", "target"), ("text", "label")),
)
"""Pairs of a question and an answer whose names mean that only beside each other."""

TEXTS = ("text", "content", "code")
"""The columns that hold a plain text."""

CONTEXTS = ("input", "context")
"""The columns that hold a text which a question is about."""

SYSTEMS = ("system", "system_prompt", "system_message")
"""The columns that hold a system message."""

HISTORY, TESTS = "history", "test_list"

TOOLS = "tools"
"""The column beside a conversation that holds the tools which the assistant may call."""

MAX_WAYS = 4
"""The most ways to read a row that a message names."""


class Columns(NamedTuple):
    """The name of the column that plays each role, or None.

    A format has either `text`; or `messages`, and optionally `system` and `history`; or `prompt` and `response`, and
    optionally `input`, `tests`, `system` and `history`.
    """

    system: str | None = None
    history: str | None = None
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
        pair, earlier = {"prompt", "response"}, {"system", "history"}
        for main, more in (({"text"}, set()), ({"messages"}, earlier), (pair, {"input", "tests"} | earlier)):
            if main <= given <= main | more:
                return None
        return (
            f"the roles {', '.join(sorted(given))} do not form a format; give text, or messages (with system or "
            "history), or prompt and response (with input, tests, system or history)"
        )

    def as_flag(self) -> str:
        """The flag that chooses these columns."""
        return "--columns " + ",".join(f"{role}={column}" for role, column in self._asdict().items() if column)


def recognise(row: Mapping[str, Any]) -> Columns | None:
    """The columns to read of a row, by their names; None where they are not known, or do not decide it."""
    ways = ways_to_read(row)
    return ways[0] if len(ways) == 1 else None


def ways_to_read(row: Mapping[str, Any]) -> list[Columns]:
    """Every way to read a row that the names of its columns allow; none where they are not known.

    A conversation comes first, then a question with its answer, then the pairs whose names are less clear, then plain
    text. Of several columns for the same, those that hold nothing do not count. A row that asks or answers anything is
    no plain text.
    """
    conversations = _that_hold(row, [name for name in CONVERSATIONS if name in row])
    if conversations:
        return [_with_common(row, Columns(messages=name)) for name in conversations]
    pairs = _pairs(row) or _other_pairs(row)
    if pairs:
        return [_with_common(row, pair) for pair in pairs]
    if not row.keys().isdisjoint((*ASKING, *ANSWERING)):
        return []
    return [Columns(text=name) for name in _that_hold(row, [name for name in TEXTS if name in row])]


def _pairs(row: Mapping[str, Any]) -> list[Columns]:
    asking = _that_hold(row, [name for name in ASKING if name in row])
    answering = _that_hold(row, [name for name in ANSWERING if name in row])
    if len(asking) > 1 and "input" in asking:
        asking.remove("input")
    if "instruction" in asking and answering == ["output"] and "prompt" in asking:
        asking.remove("prompt")  # Alpaca is also published with its question written out a second time
    return [Columns(prompt=question, response=answer) for question in asking for answer in answering]


def _other_pairs(row: Mapping[str, Any]) -> list[Columns]:
    asked = row.keys() & {*ASKING, *ANSWERING} - {"input"}
    found = [pair for pair in OTHER_PAIRS if row.keys() >= {*pair} >= asked]
    held = [pair for pair in found if all(holds_something(row[name]) for name in pair)]
    return [Columns(prompt=question, response=answer) for question, answer in held or found[:1]]


def _with_common(row: Mapping[str, Any], columns: Columns) -> Columns:
    """The columns together with those that may stand beside any question or conversation."""
    system = next(iter(_that_hold(row, [name for name in SYSTEMS if name in row])), None)
    history = HISTORY if isinstance(row.get(HISTORY), Sequence) and not isinstance(row[HISTORY], str) else None
    columns = columns._replace(system=system, history=history)
    if columns.prompt is None:
        return columns
    about = [name for name in CONTEXTS if name in row and name != columns.prompt]
    return columns._replace(
        input=next(iter(_that_hold(row, about)), None),
        tests=TESTS if columns.response == "code" and TESTS in row else None,
    )


def _that_hold(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those columns of several that hold something; the first one where none does."""
    return [name for name in names if holds_something(row[name])] or [*names[:1]]


def holds_something(value: Any) -> bool:
    """Whether a value is not null, blank or an empty list or object."""
    return value is not None and value != [] and value != {} and not (isinstance(value, str) and not value.strip())


def why_not_recognised(row: Mapping[str, Any]) -> str:
    """Say why the names of a row's columns do not tell how to read it, and what to do."""
    if "chosen" in row and "rejected" in row:
        return _preference(row)
    if ways := ways_to_read(row):
        more = f", or {len(ways) - MAX_WAYS} more" if len(ways) > MAX_WAYS else ""
        flags = " or ".join(way.as_flag() for way in ways[:MAX_WAYS])
        return f"its columns can be read in {len(ways)} ways; give the one that is meant: {flags}{more}"
    names = ", ".join(sorted(str(name)[:40] for name in row)[:12]) or "none"
    said = f"no known format has its columns ({names}); "
    if not row.keys().isdisjoint(("label", "labels", "choices", "options", "sol1", "endings")):
        return said + "write what is asked and its answer in words, in the columns prompt and response"
    return said + "say which to read with --columns"


def _preference(row: Mapping[str, Any]) -> str:
    """Say that rows of preferences are not trained on as such, and with which columns their chosen answers are."""
    asking = [name for name in ASKING if isinstance(row.get(name), str)]
    if not isinstance(row["chosen"], str):
        columns = Columns(messages="chosen")
    elif asking:
        columns = _with_common(row, Columns(prompt=asking[0], response="chosen"))
    else:
        columns = Columns(text="chosen")
    return (
        "preference data (chosen, rejected), which no command here trains on; to train on the chosen answers alone, "
        f"give {columns.as_flag()}"
    )


def label_problem(row: Mapping[str, Any], columns: Columns) -> str | None:
    """What to do about an answer that is the number of a class; None where it is none."""
    label = None if columns.response is None else row.get(columns.response)
    if columns.response != "label" or not isinstance(label, int):
        return None
    names = [str(name) for name in row if "label" in str(name) and isinstance(row[name], str)]
    named = Columns(prompt=columns.prompt, response=names[0] if names else "COLUMN").as_flag()
    need = "" if names else "add a column with the names of the classes, and "
    alone = Columns(text=columns.prompt).as_flag()
    return f"label is a number, which says nothing; {need}give {named}, or {alone} to train on the text alone"


def unread_columns(row: Mapping[str, Any], columns: Columns) -> list[str]:
    """The columns of a row that hold something and play no role."""
    in_turns = columns.messages is not None or (
        columns.prompt is not None and isinstance(row.get(columns.prompt), list)
    )
    read = {*columns, *((TOOLS,) if in_turns else ())}
    return [str(name) for name, value in row.items() if name not in read and holds_something(value)]
