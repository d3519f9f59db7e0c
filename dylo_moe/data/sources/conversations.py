"""How the turns of a conversation are read: messages, thoughts, tools, and which answers are learned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dylo_moe.data.sources.examples import (
    ASSISTANT,
    SYSTEM,
    THOUGHT_KEYS,
    TOOL,
    USER,
    Example,
    Fate,
    Message,
    RowError,
    clean_text,
)
from dylo_moe.data.sources.roles import TOOLS, holds_something

SPEAKERS = {
    "user": USER,
    "human": USER,
    "prompter": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "function_call": ASSISTANT,
    "system": SYSTEM,
    "developer": SYSTEM,
    "tool": TOOL,
    "function": TOOL,
    "ipython": TOOL,
    "observation": TOOL,
}
"""The role of a message's speaker, by the names that chat and ShareGPT data use for it. What a `function_call` says is
a call of a tool."""

WEIGHT_KEYS = ("weight", "train", "train_on", "loss")
"""The keys of a message that say, with 0 or false, that an answer is read but not learned."""

_THINKING = "thinking"

_TEXTS = ("text", "input_text", "output_text", _THINKING)
"""The types of the parts of a content that are text."""

_READ_KEYS = {"role", "content", "from", "value", "name", "tool_calls", "function_call", "tool_call_id"}


class _Turn(NamedTuple):
    """A message before its content is looked at."""

    role: str
    message: dict[str, Any]
    content_key: str


def read_conversation(row: dict[str, Any], column: str) -> Example:
    """Read a conversation that users and an assistant hold in turns, with tools if the row has a column `tools`.

    A message is `{role, content}` or `{from, value}`. What follows the last answer that is learned is left out, since
    nothing learns from it.

    Raises:
        RowError: for a row without such a conversation, or with parts that are not text.
    """
    given = row.get(column)
    if given is None or given == []:
        raise RowError(Fate.EMPTY, f"{column} is {'empty' if given == [] else 'null' if column in row else 'missing'}")
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise RowError(Fate.MALFORMED, f"{column} is not a list of messages")
    turns = [_turn(message) for message in given]
    system = []
    if turns[0].role == SYSTEM:
        first, *turns = turns
        if first.message.get(first.content_key) not in (None, "", []):
            system = [_message(first)]
    _check_order(turns)
    answers = [place for place, turn in enumerate(turns) if turn.role == ASSISTANT]
    if not answers:
        raise RowError(Fate.EMPTY, "no message of the assistant")
    learned = [place for place in answers if _is_learned(turns[place].message)]
    if not learned:
        raise RowError(Fate.EMPTY, "none of its answers is to be learned: all have weight 0")
    notes = []
    if learned[-1] != answers[-1]:
        notes.append("its last answers have weight 0 and are left out")
    elif answers[-1] != len(turns) - 1:
        notes.append("its last message has no answer and is left out")
    *context, last = [*system, *map(_message, turns[: learned[-1] + 1])]
    notes += [f"its messages' {key} is not read" for key in _unread(turn.message for turn in turns)]
    return Example(
        tuple(context), last.content, "; ".join(notes), last.thought, last.tool_calls, _tools(row.get(TOOLS))
    )


def _turn(message: Any) -> _Turn:
    if not isinstance(message, dict):
        raise RowError(Fate.MALFORMED, "a message is not an object")
    speaker, content = ("role", "content") if "role" in message else ("from", "value")
    name = message.get(speaker)
    if not isinstance(name, str) or name.lower() not in SPEAKERS:
        shown = repr(name[:20]) if isinstance(name, str) else "missing or not a string"
        raise RowError(Fate.MALFORMED, f"a message's role is {shown}, none of {', '.join(SPEAKERS)}")
    if name.lower() == "function_call":
        message = {**message, "tool_calls": message.get(content), content: None}
    elif message.get("function_call") is not None:
        message = {**message, "tool_calls": [message["function_call"]]}
    return _Turn(SPEAKERS[name.lower()], message, content)


def _check_order(turns: Sequence[_Turn]) -> None:
    expected = [USER]
    for turn in turns:
        if turn.role not in expected:
            raise RowError(Fate.MALFORMED, f"a message of the {turn.role} where the {expected[0]}'s turn is")
        if turn.role == ASSISTANT:
            expected = [TOOL] if turn.message.get("tool_calls") else [USER]
        else:
            expected = [ASSISTANT, TOOL] if turn.role == TOOL else [ASSISTANT]


def _message(turn: _Turn) -> Message:
    calls = _calls(turn.message.get("tool_calls")) if turn.role == ASSISTANT else ()
    content, thought = _content(turn, may_be_empty=bool(calls) or turn.role == TOOL)
    for key in THOUGHT_KEYS if turn.role == ASSISTANT else ():
        value = turn.message.get(key)
        if value is not None and value != "" and not thought:
            thought = clean_text(value, f"a message's {key}")
    words = {}
    for key in ("name", "tool_call_id"):
        if turn.message.get(key) not in (None, ""):
            words[key] = clean_text(turn.message[key], f"a message's {key}")
    return Message(turn.role, content, thought, calls, trained=_is_learned(turn.message), **words)


def _content(turn: _Turn, *, may_be_empty: bool) -> tuple[str, str]:
    """A message's content, and the thought in it if it is a list of parts."""
    value, thought = turn.message.get(turn.content_key), ""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        parts = [_part(part) for part in value]
        value = "".join(text for kind, text in parts if kind != _THINKING)
        thought = "".join(text for kind, text in parts if kind == _THINKING)
        if thought and turn.role != ASSISTANT:
            raise RowError(Fate.MALFORMED, f"a message of the {turn.role} holds thoughts")
    if may_be_empty and (value is None or value == ""):
        return "", thought
    return clean_text(value, f"a message's {turn.content_key}"), thought


def _part(part: Any) -> tuple[str, str]:
    """The kind and the text of a part of a content."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind not in _TEXTS:
        raise RowError(Fate.MALFORMED, f"a message holds a part of type {str(kind)[:20]!r}; only text is read")
    text = part.get(_THINKING if kind == _THINKING else "text")
    if not isinstance(text, str):
        raise RowError(Fate.MALFORMED, f"a part of type {kind!r} of a message has no text")
    return kind, text


def _is_learned(message: dict[str, Any]) -> bool:
    """Whether an answer is learned. Raises RowError for a weight that is neither 0 nor 1."""
    for key in WEIGHT_KEYS:
        weight = message.get(key)
        if weight is not None and weight not in (0, 1):
            raise RowError(Fate.MALFORMED, f"a message's {key} is {str(weight)[:20]}, neither 0 nor 1")
        if weight is not None and not weight:
            return False
    return True


def _unread(messages: Iterable[dict[str, Any]]) -> list[str]:
    """The keys of messages that hold something and are not read."""
    known = {*_READ_KEYS, *THOUGHT_KEYS, *WEIGHT_KEYS}
    return sorted({str(key) for message in messages for key in message.keys() - known if holds_something(message[key])})


def _calls(value: Any) -> tuple[dict[str, Any], ...]:
    """The calls of a message, as templates take them: `{"type": "function", "function": {name, arguments}}`."""
    calls = []
    for call in _objects(value, "tool_calls"):
        call = {"type": "function", "function": call} if "function" not in call else call
        function = call["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(Fate.MALFORMED, "a call of a tool has no name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str) and not isinstance(_parsed(arguments), dict):
            raise RowError(Fate.MALFORMED, "the arguments of a call of a tool are not a JSON object")
        if not isinstance(arguments, (str, dict)):
            raise RowError(Fate.MALFORMED, "the arguments of a call of a tool are not a JSON object")
        kept = {key: item for key, item in call.items() if item is not None}
        calls.append({**kept, "function": {**function, "arguments": arguments}})
    return tuple(calls)


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools of a row, as templates take them: `{"type": "function", "function": {name, parameters}}`."""
    tools = _objects(value, "tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects, which may be written as JSON; a single one is a list of one."""
    found = _parsed(value) if isinstance(value, str) and value.strip() else value
    found = [found] if isinstance(found, dict) else found
    if found is None or found == "":
        return []
    if not isinstance(found, Sequence) or not all(isinstance(item, dict) for item in found):
        raise RowError(Fate.MALFORMED, f"{name} is not a list of objects")
    return list(found)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
