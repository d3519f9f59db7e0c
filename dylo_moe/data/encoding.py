"""Turn examples into token ids and labels.

With a chat template, a row is what the template writes for the whole conversation, to the end of the last answer.
Without one, a system message and a question are each followed by an empty line, and an answer by the end token. What a
model must write itself is trained: all that follows the generation prompt, such as a thinking block or a channel, the
answer, and the end of the turn. Plain text uses no template: all of it and the end token are trained.

What is before the trained tokens is exactly what a model is given when it generates. So an earlier answer is trained
where the row holds it as it would be generated, not where the template writes it otherwise once it is past.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dylo_moe.data.config import ALL, CUT, DROP, RESPONSE
from dylo_moe.data.control_tokens import ControlTokens, control_tokens, held
from dylo_moe.data.sources.examples import ASSISTANT, TOOL, USER, Example, Fate, Message, RowError
from dylo_moe.data.template_probes import probe_template, text_with_a_call
from dylo_moe.data.templates import Template, Turn
from dylo_moe.data.token_rows import REWRITTEN, TokenRow, Written, assemble, ids_of_text, ids_of_texts, joined

IGNORED = -100
"""The label of a token that the loss ignores."""


@dataclass(frozen=True)
class TextFormat:
    """How one tokenizer writes an exchange; made by `text_format`."""

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    control: ControlTokens
    """The tokens that a row's own text never becomes."""
    start_ids: tuple[int, ...]
    """What the tokenizer puts before a text that no template wrote, such as its bos token; or nothing."""
    begin_ids: tuple[int, ...]
    """What begins every text that the template writes and nothing else, such as its bos token; or nothing."""
    response_end_id: int
    """The token that ends a response: the template's end of turn, which need not be eos. Generation must stop at it."""
    text_end_id: int
    """The token that ends a plain text: eos."""
    end_ids: tuple[int, ...]
    """Each token that ends what a model says: a response, a call of a tool, or a plain text."""
    end_texts: tuple[str, str]
    """What ends a response and a plain text, as it is written."""


class Encoded(NamedTuple):
    """One training row."""

    input_ids: list[int]
    labels: list[int]
    """The token ids that are trained, and -100 elsewhere."""
    prompt_length: int
    """The number of tokens before the first answer; 0 for plain text."""
    whole_length: int
    """The number of tokens before anything was cut."""
    cut_prompt: bool = False
    cut_response: bool = False
    note: str = ""
    """A remark about parts of the row that are not trained; empty if there are none."""


def text_format(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    """Find out how this tokenizer writes an exchange.

    Many templates add a system message of their own when there is none (SmolLM2's costs 16 tokens of every
    row). If the template takes an empty one and its text gets shorter by it, rows are written with the empty
    one; so generate from `encode_prompt`, not from the bare template.

    Raises:
        ValueError: for a tokenizer without an eos token, or a template that does not write what is said.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos token, so a model could not learn to stop; set tokenizer.eos_token")
    template = probe_template(tokenizer) if tokenizer.chat_template else None
    start_ids = _start_ids(tokenizer)
    begin_ids: tuple[int, ...] = start_ids
    written: list[str] = []
    ends = [eos]
    if template is not None:
        asked = [Message(USER, "a")]
        probe = template.turn([*asked, Message(ASSISTANT, "b")]).text
        named = tokenizer.chat_template
        written = [*(named.values() if isinstance(named, dict) else [named]), probe]
        ids = ids_of_text(tokenizer, probe)
        begin_ids = start_ids if start_ids and tuple(ids[: len(start_ids)]) == start_ids else ()
        if not begin_ids and ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id:
            begin_ids = (ids[0],)
        ends.insert(0, ids[-1])
        if called := text_with_a_call(template):
            ends.append(ids_of_text(tokenizer, called)[-1])
    return TextFormat(
        tokenizer=tokenizer,
        template=template,
        control=control_tokens(tokenizer, written),
        start_ids=start_ids,
        begin_ids=begin_ids,
        response_end_id=ends[0],
        text_end_id=eos,
        end_ids=tuple(sorted(set(ends))),
        end_texts=(tokenizer.eos_token if template is None else template.end, tokenizer.eos_token),
    )


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    size = next((size for size in range(len(whole)) if whole[size : size + len(bare)] == bare), 0)
    return tuple(whole[:size])


def encode_prompt(text_format: TextFormat, prompt: str) -> list[int]:
    """Token ids of a prompt, ready to generate from; the same ids that training puts before the response.

    Raises:
        RowError: for a prompt that the template refuses, or whose control tokens cannot be written as characters.
    """
    form = text_format
    messages, hidden = _contents(form, Example((Message(USER, prompt),), ""))
    if form.template is None:
        text = _joined(form, messages[:-1])
    else:
        text = form.template.prompt(form.template.with_system(messages[:-1]))
    ids = form.control.ids_of(text, hidden) if hidden else ids_of_text(form.tokenizer, text)
    return [*_prompt_start(form), *ids]


def encode(
    text_format: TextFormat, example: Example, *, max_seq_length: int, overlong: str = CUT, loss_on: str = RESPONSE
) -> Encoded:
    """Encode one example as `encode_batch` does, but raise the RowError instead of returning it."""
    (found,) = encode_batch(text_format, [example], max_seq_length=max_seq_length, overlong=overlong, loss_on=loss_on)
    if isinstance(found, RowError):
        raise found
    return found


def encode_batch(
    text_format: TextFormat,
    examples: Sequence[Example],
    *,
    max_seq_length: int,
    overlong: str = CUT,
    loss_on: str = RESPONSE,
) -> list[Encoded | RowError]:
    """Encode examples as token ids and labels, each at most `max_seq_length` tokens.

    With `overlong` "cut", a row that is too long loses the start of its prompt if its last response then fits. A
    response that does not fit is cut at its end and has no end token; what is before it then keeps at most half of the
    row. With "drop" such a row is an error.

    Returns:
        For each example its row, or a RowError: nothing could be learned from it, the template refuses it or does not
        write a part of it, or it holds a control token that the tokenizer cannot write as characters.
    """
    written = [_write(text_format, example) for example in examples]
    ordinary = [item for item in written if not isinstance(item, RowError) and not item.hidden]
    ids = ids_of_texts(text_format.tokenizer, sorted({text for item in ordinary for text in item.parts()}))
    rows: list[Encoded | RowError] = []
    for item in written:
        try:
            if isinstance(item, RowError):
                raise item
            row = assemble(text_format.control, item, ids)
            rows.append(_finish(row, max_seq_length=max_seq_length, overlong=overlong, loss_on=loss_on))
        except RowError as error:
            rows.append(error)
    return rows


# An example as text


def _write(form: TextFormat, example: Example) -> Written | RowError:
    try:
        messages, hidden = _contents(form, example)
        notes = [example.note, f"{held(hidden)}, written as plain characters" if hidden else ""]
        if not example.context:
            text = messages[-1].content
            start, end = form.start_ids, (form.text_end_id,)
            return Written(text, [(0, len(text))], hidden, joined(*notes), start, end, begin_ids=start)
        has_tools = example.tools or any(message.role == TOOL or message.tool_calls for message in messages)
        if form.template is None and has_tools:
            raise RowError(Fate.MALFORMED, "it has tools, which only a chat template can write, and there is none")
        if form.template is None and any(message.thought for message in messages):
            notes.append("its thoughts are left out: there is no chat template to write them")
        tools = form.control.hide(example.tools, hidden) if hidden else example.tools
        if form.template is not None:
            messages = form.template.with_system(messages)
            if problem := form.template.problem(messages, tools):
                raise RowError(Fate.MALFORMED, problem)
        last = _turn(form, messages, tools)
        answers = []
        for place, message in enumerate(messages[:-1]):
            if message.role != ASSISTANT or not message.trained:
                continue
            turn = _turn(form, messages[: place + 1], tools)
            if last.text.startswith(turn.text[: turn.size]):
                answers.append((len(turn.prompt), turn.size))
            else:
                notes.append(REWRITTEN)
            notes += [turn.note]
        answers.append((len(last.prompt), len(last.text)))
        note = joined(*notes, last.note)
        begin_ids = form.start_ids if form.template is None else form.begin_ids
        return Written(last.text, answers, hidden, note, _prompt_start(form), begin_ids=begin_ids)
    except RowError as error:
        return error


def _turn(form: TextFormat, messages: Sequence[Message], tools: Sequence[dict]) -> Turn:
    """The last message, an answer, behind what a model is given for it."""
    if form.template is not None:
        return form.template.turn(messages, tools)
    text = _joined(form, messages)
    return Turn(_joined(form, messages[:-1]), text, len(text))


def _joined(form: TextFormat, messages: Sequence[Message]) -> str:
    """Messages without a template."""
    ends = {ASSISTANT: form.end_texts[0]}
    return "".join(message.content + ends.get(message.role, "\n\n") for message in messages)


def _contents(form: TextFormat, example: Example) -> tuple[list[Message], dict[str, str]]:
    """The messages as they are written: thoughts apart, no token twice that the row gets anyway, and placeholders for
    the control tokens that they hold."""
    messages = list(example.messages)
    messages = [_own_ends_removed(form, message, is_plain=not example.context) for message in messages]
    start_ids = form.start_ids if not example.context or form.template is None else form.begin_ids
    if start_ids:
        start = "".join(form.tokenizer.convert_ids_to_tokens(list(start_ids)))
        messages[0] = messages[0]._replace(content=messages[0].content.removeprefix(start))
    if form.template is not None:
        messages = [form.template.as_wanted(message) for message in messages]
    values = [*messages, example.tools] if example.tools else messages
    hidden = form.control.hidden(_texts_of(values))
    if not hidden:
        return messages, {}
    messages = [form.control.hide(message, hidden) for message in messages]
    if form.template is not None and form.template.takes_inline:
        messages = [_with_own_thought(message, hidden) for message in messages]
    still = list(_texts_of([*messages, form.control.hide(example.tools, hidden)]))
    hidden = {place: token for place, token in hidden.items() if any(place in text for text in still)}
    return messages, hidden


def _own_ends_removed(form: TextFormat, message: Message, *, is_plain: bool) -> Message:
    """An answer or a plain text without the end token that it brings, since every row gets one."""
    if message.role != ASSISTANT:
        return message
    ends = form.end_texts[1:] if is_plain else form.end_texts
    end = next((end for end in ends if message.content.endswith(end)), "")
    if end and not message.content.removesuffix(end).strip():
        raise RowError(Fate.EMPTY, "its response has no token")
    return message._replace(content=message.content.removesuffix(end)) if end else message


def _with_own_thought(message: Message, hidden: Mapping[str, str]) -> Message:
    """An answer that begins with a thought: its <think> and </think> are the template's tokens, not text."""
    places = {token: place for place, token in hidden.items()}
    first, last = places.get("<think>", "<think>"), places.get("</think>", "</think>")
    content = message.content
    if message.role != ASSISTANT or not content.lstrip().startswith(first) or last not in content:
        return message
    return message._replace(content=content.replace(first, "<think>", 1).replace(last, "</think>", 1))


def _texts_of(value: object) -> Iterable[str]:
    """All texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts_of(name)
            yield from _texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts_of(item)


def _prompt_start(form: TextFormat) -> tuple[int, ...]:
    """What is put before a prompt; a template writes its own."""
    return form.start_ids if form.template is None else ()


# Token ids as a row


def _finish(row: TokenRow, *, max_seq_length: int, overlong: str, loss_on: str) -> Encoded:
    """Cut a row to at most `max_seq_length` tokens, and label it. A cut at its start keeps what begins every row."""
    length, last_answer = len(row.ids), row.answers[-1][0]
    first, last, cut_response = 0, length, False
    if length > max_seq_length:
        if overlong == DROP:
            raise RowError(Fate.TOO_LONG, f"over {max_seq_length} tokens", length)
        cut_response = length - last_answer >= max_seq_length
        first = last_answer - min(last_answer, max_seq_length // 2) if cut_response else length - max_seq_length
        last = first + max_seq_length
    labels = [IGNORED] * length
    for start, end in [(0, length)] if loss_on == ALL else row.answers:
        labels[start:end] = row.ids[start:end]
    kept = row.num_begin if first > 0 and first + row.num_begin <= last_answer else 0
    ids = [*row.ids[:kept], *row.ids[first + kept : last]]
    labels = [*labels[:kept], *labels[first + kept : last]]
    if all(label == IGNORED for label in labels[1:]):  # the first label predicts from nothing and is never used
        raise RowError(Fate.EMPTY, "nothing in it could be trained")
    prompt_length = max(row.answers[0][0] - first, 0)
    return Encoded(ids, labels, prompt_length, length, first > 0, cut_response, row.note)
