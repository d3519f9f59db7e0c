"""What a row is read into: an example to learn, or the reason why there is none."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""The keys of a message under which data and templates know what an assistant thought before its answer."""


class Fate(IntEnum):
    """Whether a row was kept, or the kind of reason why it was left out."""

    KEPT = 0
    EMPTY = 1
    MALFORMED = 2
    TOO_LONG = 3
    CONTAMINATED = 4


class RowError(ValueError):
    """A row that cannot be trained on: its fate, and the reason in a few words.

    Args:
        length: the row's length in tokens, if that is the reason.
    """

    def __init__(self, fate: Fate, reason: str, length: int = 0) -> None:
        self.fate = fate
        self.reason = printable(reason)
        super().__init__(self.reason)
        self.length = length


def printable(text: str) -> str:
    """Turn any text into one line that can be shown and stored."""
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(character if character.isprintable() else "?" for character in whole)


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str
    thought: str = ""
    """What an assistant thought before this answer; empty if the row has no thoughts apart from its answers."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """The tools that an assistant calls, each `{"type": "function", "function": {"name": ..., "arguments": ...}}`."""
    name: str = ""
    """Who speaks, or the tool that gave this result."""
    tool_call_id: str = ""
    trained: bool = True
    """Whether an answer is learned, rather than only read."""


class Example(NamedTuple):
    """One text to learn: a `response` to a `context`. Without context it is plain text, all of which is trained.

    The context ends with a turn of a user or a tool, and may begin with a system message. Earlier answers in it are
    trained as well, unless they say otherwise.
    """

    context: tuple[Message, ...]
    response: str
    note: str = ""
    """A remark about parts that were left out when the row was read; empty if none were."""
    thought: str = ""
    """What the assistant thought before the response."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """The tools that the response calls, as in a `Message`."""
    tools: tuple[dict[str, Any], ...] = ()
    """The tools that may be called: `{"type": "function", "function": {"name": ..., "parameters": ...}}`."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation, the response included."""
        return (*self.context, Message(ASSISTANT, self.response, self.thought, self.tool_calls))

    @property
    def question(self) -> str:
        """The first question; empty for plain text. Rows with the same question stay on one side of a split."""
        return next((message.content for message in self.context if message.role == USER), "")

    @property
    def text(self) -> str:
        """The whole conversation as one text, its thoughts included."""
        return "\n".join(text for message in self.messages for text in (message.thought, message.content) if text)


def ask(prompt: str, response: str) -> Example:
    """The example of one question and its answer."""
    return Example((Message(USER, prompt),), response)


def clean_text(value: Any, name: str) -> str:
    r"""Check that a value can be tokenised, and make its line ends \n. Raises RowError, naming the field, if it
    cannot."""
    if value is None:
        raise RowError(Fate.EMPTY, f"{name} is null")
    if isinstance(value, bytes):
        raise RowError(Fate.MALFORMED, f"{name} holds bytes, of which no encoding is known; store it as UTF-8 strings")
    if isinstance(value, (int, float)):
        raise RowError(Fate.MALFORMED, f"{name} is not a string but {str(value)[:20]}; write it as text, in quotes")
    if not isinstance(value, str):
        raise RowError(Fate.MALFORMED, f"{name} is not a string")
    if not value.strip():
        raise RowError(Fate.EMPTY, f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(Fate.MALFORMED, f"{name} holds half a surrogate pair") from None
    return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value
