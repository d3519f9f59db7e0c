"""Find the tokens that open and close an answer in a chat template, by letting it write short conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from dylo_moe.data.encoding import TextFormat, text_format
from dylo_moe.data.sources.examples import ASSISTANT, SYSTEM, USER, Message, RowError
from dylo_moe.data.templates import Template
from dylo_moe.data.token_rows import ids_of_text
from dylo_moe.routing.turn_tokens import TurnTokens

_ASKED = (Message(USER, "probe question"), Message(USER, "Then what, 7?"))
_ANSWERED = (Message(ASSISTANT, "probe answer"), Message(ASSISTANT, "Two of them."))
_SYSTEM = Message(SYSTEM, "probe system")

INSTEAD = "use granularity 'token', or 'sequence'"


def find_turn_tokens(tokenizer: PreTrainedTokenizerBase) -> TurnTokens:
    """The tokens that open and close an answer in a tokenizer's chat template.

    An answer is recognised at the earliest token of its header at which a few tokens stand that hold a control token,
    which no text of a user can become, and that stand before answers alone. What closes it is the first control token
    behind its content, where another turn follows or none, and whatever else ends what a model says.

    Raises:
        ValueError: where the tokenizer has no chat template, or nothing in what it writes tells answers from the rest.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise ValueError(
            f"granularity is 'response', and the tokenizer of {name} has no chat template that would tell where an "
            f"answer begins: {INSTEAD}"
        )
    form = text_format(tokenizer)
    assert form.template is not None
    conversations = list(_conversations(form.template))
    texts = [ids_of_text(tokenizer, form.template.turn(messages).text) for messages in conversations]
    num_answers = [sum(message.role == ASSISTANT for message in messages) for messages in conversations]
    header = _common_end(list(_prompts(form.template)), tokenizer)
    for last in range(len(header)):
        for first in range(last, -1, -1):
            recognised = header[first : last + 1]
            if form.control.ids.isdisjoint(recognised):
                continue
            if [_count(ids, recognised) for ids in texts] == num_answers:
                endings = _endings(form, conversations)
                turns = TurnTokens(tuple(header[first:]), last - first, tuple((ending,) for ending in endings))
                if all(map(_is_closed, texts, num_answers, [turns] * len(texts))):
                    return turns
    raise ValueError(
        f"granularity is 'response', and in what the chat template of {name} writes, no control token tells where an "
        f"answer begins and ends: {INSTEAD}"
    )


def _conversations(template: Template) -> Iterator[list[Message]]:
    """Conversations of one answer and of two, and where the template takes it with a system message."""
    short, long = [_ASKED[0], _ANSWERED[0]], [_ASKED[0], _ANSWERED[0], _ASKED[1], _ANSWERED[1]]
    for messages in (short, long, [_SYSTEM, *short], [_SYSTEM, *long]):
        try:
            messages = template.with_system(messages)
            template.turn(messages)
        except RowError:
            continue
        yield messages


def _prompts(template: Template) -> Iterator[str]:
    """What a model is given before each of the answers."""
    for messages in _conversations(template):
        for place, message in enumerate(messages):
            if message.role == ASSISTANT:
                yield template.prompt(messages[:place])


def _common_end(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which all of these texts end."""
    rows = [ids_of_text(tokenizer, text)[::-1] for text in texts]
    size = 0
    while all(size < len(row) and row[size] == rows[0][size] for row in rows):
        size += 1
    return rows[0][:size][::-1]


def _count(ids: Sequence[int], part: Sequence[int]) -> int:
    """How often some ids stand behind one another among others."""
    return sum(list(ids[place : place + len(part)]) == list(part) for place in range(len(ids) - len(part) + 1))


def _endings(form: TextFormat, conversations: Sequence[Sequence[Message]]) -> list[int]:
    """The tokens that close an answer: each ends what a model says or, where a template writes another end of an answer
    that is past, is the first control token behind it."""
    assert form.template is not None
    found = set(form.end_ids)
    for messages in conversations:
        rest = form.template.turn(messages).text
        for message in messages:
            if message.role == ASSISTANT:
                rest = rest.partition(message.content)[2]
                if rest.startswith(form.template.end):
                    continue
                ids = ids_of_text(form.tokenizer, rest)
                found |= set(next(([index] for index in ids if index in form.control.ids), []))
    return sorted(found)


def _is_closed(ids: Sequence[int], num_answers: int, turns: TurnTokens) -> bool:
    """Whether each answer of a text is closed before the next one begins, and the last one by its end."""
    ends, is_open, closed = {ending[0] for ending in turns.endings}, False, 0
    for place in range(len(ids)):
        if tuple(ids[: place + 1][-len(turns.recognised) :]) == turns.recognised:
            if is_open:
                return False
            is_open = True
        elif is_open and ids[place] in ends:
            is_open, closed = False, closed + 1
    return closed == num_answers and not is_open
