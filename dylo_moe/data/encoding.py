"""Turn examples into token ids and labels.

A chat template, if the tokenizer has one, writes the context, and the response follows. Without one, a system message
and a question are each followed by an empty line. The response and the token that ends it are trained, and so are
earlier answers of a conversation. Plain text uses no template: all of it and the end token are trained.

The rendered prompt is exactly what a model is given when it generates, and the response follows it. So
training and generation see the same ids even where a template writes past turns differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.config import ALL, CUT, DROP, RESPONSE
from dylo_moe.data.sources.examples import ASSISTANT, SYSTEM, USER, Example, Fate, Message, RowError

IGNORED = -100
"""The label of a token that the loss ignores."""

_PROBE = "probe"

# Some templates write today's date, but rows must be the same tomorrow. Llama 3's template writes this date if it is
# given none.
_FIXED_DATE = (
    "{%- macro strftime_now(form) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024', '%Y': '2024'}.get(form, '26 Jul 2024') }}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True)
class TextFormat:
    """How one tokenizer writes an exchange; made by `text_format`."""

    tokenizer: PreTrainedTokenizerBase
    has_template: bool
    takes_system: bool
    """Whether the template takes a system message; otherwise it is put before the first question."""
    system: tuple[Message, ...]
    """An empty system message where the template would put a longer one of its own, else nothing."""
    start_ids: tuple[int, ...]
    """What the tokenizer puts before a text that no template wrote: its bos token, or nothing."""
    response_end_id: int
    """The token that ends a response: the template's end of turn, which need not be eos. Generation must stop at it."""
    text_end_id: int
    """The token that ends a plain text: eos."""
    end_texts: tuple[str, str]
    """Both end tokens as they are written."""


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
    one; so generate from `encode_prompt`, not from the bare template. Raises ValueError without an eos token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos token, so a model could not learn to stop; set tokenizer.eos_token")
    has_template = bool(tokenizer.chat_template)
    bare = tokenizer("a", add_special_tokens=True)["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and bare[:1] == [tokenizer.bos_token_id]
    response_end = _end_of_turn(tokenizer) if has_template else eos
    end_texts = [str(token) for token in tokenizer.convert_ids_to_tokens([response_end, eos])]
    return TextFormat(
        tokenizer=tokenizer,
        has_template=has_template,
        takes_system=not has_template or _takes_system(tokenizer),
        system=_shorter_system(tokenizer) if has_template else (),
        start_ids=(tokenizer.bos_token_id,) if adds_bos else (),
        response_end_id=response_end,
        text_end_id=eos,
        end_texts=(end_texts[0], end_texts[1]),
    )


def encode_prompt(text_format: TextFormat, prompt: str) -> list[int]:
    """Token ids of a prompt, ready to generate from; the same ids that training puts before the response."""
    text = _render_prompt(text_format, [Message(USER, prompt)])
    return [*_start_ids(text_format, has_prompt=True), *_ids(text_format.tokenizer, text)]


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
        For each example its row, or a RowError: nothing could be learned from it, the template refuses it, or its text
        holds the end token, which would teach the model to stop in the middle.
    """
    written = [_write(text_format, example) for example in examples]
    texts = {text for item in written if not isinstance(item, RowError) for text in item.texts()}
    ids = _ids_of(text_format.tokenizer, sorted(texts))
    rows: list[Encoded | RowError] = []
    for item in written:
        try:
            if isinstance(item, RowError):
                raise item
            row, note = _assemble(text_format, item, ids)
            rows.append(_finish(row, note, max_seq_length=max_seq_length, overlong=overlong, loss_on=loss_on))
        except RowError as error:
            rows.append(error)
    return rows


# An example as text


class _Turn(NamedTuple):
    """An answer, and the text between the end of the previous answer and this one."""

    before: str
    answer: str


class _Written(NamedTuple):
    """An example as text, not yet tokenised."""

    turns: list[_Turn]
    prompt: str
    """The text from which the model generates the last answer."""
    note: str

    def texts(self) -> list[str]:
        """All texts that have to be tokenised."""
        parts = [text for turn in self.turns for text in (turn.before, turn.before + turn.answer) if text]
        return [*parts, self.prompt] if len(self.turns) > 1 else parts


def _write(form: TextFormat, example: Example) -> _Written | RowError:
    if any(end in example.text for end in form.end_texts):
        return RowError(Fate.MALFORMED, f"it holds the end token {' or '.join(sorted(set(form.end_texts)))}")
    if not example.context:
        return _Written([_Turn("", example.response)], "", example.note)
    try:
        prompt = _render_prompt(form, example.context)
        earlier = _earlier_turns(form, example, prompt)
    except TemplateError as error:
        return RowError(Fate.MALFORMED, f"the chat template refuses it: {str(error)[:80]}")
    if earlier is None:
        return _only_last(prompt, example.response, example.note)
    start = sum(len(turn.before) + len(turn.answer) + len(_end_text(form)) for turn in earlier)
    return _Written([*earlier, _Turn(prompt[start:], example.response)], prompt, example.note)


def _only_last(prompt: str, response: str, note: str) -> _Written:
    rewritten = "only its last answer is trained: earlier ones are not in the prompt as they were given"
    return _Written([_Turn(prompt, response)], prompt, "; ".join(filter(None, (note, rewritten))))


def _earlier_turns(form: TextFormat, example: Example, prompt: str) -> list[_Turn] | None:
    """The answers before the last, as they are in `prompt`; None if the template changed one of them."""
    turns: list[_Turn] = []
    done = 0
    for place, message in enumerate(example.context):
        if message.role != ASSISTANT:
            continue
        before = _render_prompt(form, example.context[:place])
        end = prompt.find(_end_text(form), len(before))
        if not prompt.startswith(before) or end < 0:
            return None
        answer = prompt[len(before) : end]
        if answer.strip() != message.content.strip():
            return None
        turns.append(_Turn(before[done:], answer))
        done = end + len(_end_text(form))
    return turns


def _end_text(form: TextFormat) -> str:
    return form.end_texts[0]


def _render_prompt(form: TextFormat, context: Sequence[Message]) -> str:
    """The text from which a model generates its answer; a template writes its own bos."""
    if not form.has_template:
        ends = {ASSISTANT: _end_text(form)}
        return "".join(message.content + ends.get(message.role, "\n\n") for message in context)
    messages = list(context)
    if messages[0].role != SYSTEM:
        messages = [*form.system, *messages]
    elif not form.takes_system:
        system, question, *rest = messages
        messages = [Message(USER, f"{system.content}\n\n{question.content}"), *rest]
    return _render(form.tokenizer, messages, generation_prompt=True)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool) -> str:
    template = tokenizer.chat_template
    text = tokenizer.apply_chat_template(
        [message._asdict() for message in messages],
        chat_template=_FIXED_DATE + template if isinstance(template, str) and "strftime_now" in template else None,
        add_generation_prompt=generation_prompt,
        tokenize=False,
    )
    assert isinstance(text, str)
    return text


# Text as ids


class _Row(NamedTuple):
    """A row before it is cut; `answers` are (start, end) spans of `ids`, each with its end token."""

    ids: list[int]
    answers: list[tuple[int, int]]


def _assemble(form: TextFormat, written: _Written, ids: dict[str, list[int]]) -> tuple[_Row, str]:
    """The row before it is cut, however long, and its note."""
    is_plain = not written.turns[0].before
    end_id = form.text_end_id if is_plain else form.response_end_id
    start_ids = _start_ids(form, has_prompt=not is_plain)
    row = _Row(list(start_ids), [])
    for place, turn in enumerate(written.turns):
        before, answer = _split(form.tokenizer, turn, ids)
        if not answer:
            raise RowError(Fate.EMPTY, "its response has no token")
        row.ids.extend(before)
        if place == len(written.turns) - 1 > 0 and row.ids != [*start_ids, *ids[written.prompt]]:
            last = _only_last(written.prompt, turn.answer, written.note)
            return _assemble(form, last, ids | _ids_of(form.tokenizer, last.texts()))
        start = 0 if is_plain else len(row.ids)
        row.ids.extend([*answer, end_id])
        row.answers.append((start, len(row.ids)))
    return row, written.note


def _split(tokenizer: PreTrainedTokenizerBase, turn: _Turn, ids: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """The ids of both parts of a turn. The answer is tokenised in its context, unless a token spans the border."""
    before = ids[turn.before] if turn.before else []
    whole = ids[turn.before + turn.answer]
    return before, whole[len(before) :] if whole[: len(before)] == before else _ids(tokenizer, turn.answer)


def _finish(row: _Row, note: str, *, max_seq_length: int, overlong: str, loss_on: str) -> Encoded:
    """Cut a row to at most `max_seq_length` tokens, and label it."""
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
    labels = labels[first:last]
    if all(label == IGNORED for label in labels[1:]):  # the first label predicts from nothing and is never used
        raise RowError(Fate.EMPTY, "nothing in it could be trained")
    prompt_length = max(row.answers[0][0] - first, 0)
    return Encoded(row.ids[first:last], labels, prompt_length, length, first > 0, cut_response, note)


def _start_ids(form: TextFormat, *, has_prompt: bool) -> tuple[int, ...]:
    return () if form.has_template and has_prompt else form.start_ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return _ids_of(tokenizer, [text])[text]


def _ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, list[int]]:
    if not texts:
        return {}
    found = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return dict(zip(texts, found["input_ids"], strict=True))


# What a template does to system messages and turn ends


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        with_system = _render(tokenizer, [Message(SYSTEM, _PROBE), Message(USER, "a")], generation_prompt=True)
    except TemplateError:  # some templates refuse a system message
        return False
    return _PROBE in with_system


def _shorter_system(tokenizer: PreTrainedTokenizerBase) -> tuple[Message, ...]:
    user, empty = Message(USER, _PROBE), Message(SYSTEM, "")
    try:
        with_empty = _render(tokenizer, [empty, user], generation_prompt=True)
    except TemplateError:
        return ()
    without = _render(tokenizer, [user], generation_prompt=True)
    is_shorter = len(_ids(tokenizer, with_empty)) < len(_ids(tokenizer, without))
    return (empty,) if is_shorter and _PROBE in with_empty else ()


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first special token that the template writes after a response, or eos if it writes none."""
    turns = [Message(USER, "a"), Message(ASSISTANT, _PROBE)]
    tail = _render(tokenizer, turns, generation_prompt=False).rpartition(_PROBE)[2]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = [index for index in _ids(tokenizer, tail) if index in special or index in tokenizer.all_special_ids]
    return after[0] if after else tokenizer.eos_token_id
