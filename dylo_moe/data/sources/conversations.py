"""How the turns of a conversation are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dylo_moe.data.sources.examples import ASSISTANT, SYSTEM, USER, Example, Fate, Message, RowError, clean_text

SPEAKERS = {
    "user": USER,
    "human": USER,
    "prompter": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "system": SYSTEM,
}
"""The role of a message's speaker, by the names that chat and ShareGPT data use for it."""


def read_conversation(row: dict[str, Any], column: str) -> Example:
    """Read turns {role, content} or {from, value}. A question after the last answer is left out, since nothing answers
    it."""
    turns = row.get(column)
    if turns is None or turns == []:
        raise RowError(Fate.EMPTY, f"{column} is {'empty' if turns == [] else 'null' if column in row else 'missing'}")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RowError(Fate.MALFORMED, f"{column} is not a list of messages")
    spoken = [_spoken(turn) for turn in turns]
    system = []
    if spoken[0][0] == SYSTEM:
        (_, content, name), *spoken = spoken
        if content is not None and content != "":
            system = [Message(SYSTEM, clean_text(content, name))]
    for place, (role, _, _) in enumerate(spoken):
        expected = (USER, ASSISTANT)[place % 2]
        if role != expected:
            raise RowError(Fate.MALFORMED, f"a message of the {role} where the {expected}'s turn is")
    note = ""
    if len(spoken) % 2:
        spoken, note = spoken[:-1], "its last message has no answer and is left out"
    if not spoken:
        raise RowError(Fate.EMPTY, "no message of the assistant")
    messages = [*system, *(Message(role, clean_text(content, name)) for role, content, name in spoken)]
    return Example(tuple(messages[:-1]), messages[-1].content, note)


def _spoken(turn: Any) -> tuple[str, Any, str]:
    """The role and the content of a turn, and how an error calls the content."""
    if not isinstance(turn, dict):
        raise RowError(Fate.MALFORMED, "a message is not an object")
    speaker, content = ("role", "content") if "role" in turn else ("from", "value")
    name = turn.get(speaker)
    if not isinstance(name, str) or name.lower() not in SPEAKERS:
        shown = repr(name[:20]) if isinstance(name, str) else "missing or not a string"
        raise RowError(Fate.MALFORMED, f"a message's role is {shown}, none of {', '.join(SPEAKERS)}")
    return SPEAKERS[name.lower()], turn.get(content), f"a message's {content}"
