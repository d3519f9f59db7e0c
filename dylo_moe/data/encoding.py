"""From an example to token ids and labels.

With a chat template the prompt is the user's turn and the response the assistant's; without one the text is
"{prompt}\\n\\n{response}". Only the response and the token that ends it are trained. Plain text uses no
template: all of it and the end token are trained.

The rendered prompt is exactly what a model is given when it generates, and the response follows it, so
training and generation see the same ids even where a template writes past turns differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.sources import Example

IGNORED = -100
"""The label that the loss leaves out."""

_PROBE = "probe"


@dataclass(frozen=True)
class TextFormat:
    """How one tokenizer writes an exchange; made by `text_format`."""

    tokenizer: PreTrainedTokenizerBase
    has_template: bool
    system: tuple[dict[str, str], ...]
    """An empty system message where the template would put a longer one of its own, else nothing."""
    start_ids: tuple[int, ...]
    """What the tokenizer puts before a text that no template wrote: its bos token, or nothing."""
    response_end_id: int
    """Ends a response: the template's end of turn, which need not be eos. Generation must stop at it."""
    text_end_id: int
    """Ends a plain text: eos."""


class Encoded(NamedTuple):
    """One training row. `prompt_ids` is the whole rendered prompt (empty for plain text), before any cut."""

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int]
    cut: bool


def text_format(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    """Find out how this tokenizer writes an exchange.

    Many templates add a system message of their own when there is none (SmolLM2's costs 16 tokens of every
    row). Where the template takes an empty one and gets shorter by it, rows are written with the empty one;
    so generate from `encode_prompt`, not from the bare template. Raises ValueError without an eos token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos token, so a model could not learn to stop; set tokenizer.eos_token")
    has_template = bool(tokenizer.chat_template)
    bare = tokenizer("a", add_special_tokens=True)["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and bare[:1] == [tokenizer.bos_token_id]
    return TextFormat(
        tokenizer=tokenizer,
        has_template=has_template,
        system=_shorter_system(tokenizer) if has_template else (),
        start_ids=(tokenizer.bos_token_id,) if adds_bos else (),
        response_end_id=_end_of_turn(tokenizer) if has_template else eos,
        text_end_id=eos,
    )


def encode_prompt(text_format: TextFormat, prompt: str) -> list[int]:
    """Token ids of a prompt, ready to generate from; the same ids that training puts before the response."""
    text, start_ids = _render_prompt(text_format, prompt)
    return [*start_ids, *_ids(text_format.tokenizer, text)]


def encode(text_format: TextFormat, example: Example, max_seq_length: int) -> Encoded | None:
    """Token ids and labels of one example, at most `max_seq_length` of them.

    A row that is too long loses the start of its prompt where the response then still fits whole. A response
    that does not fit is cut at its end and has no end token; its prompt then keeps at most half the row.
    None where nothing could be learned, or where the text holds the end token itself, which would
    teach the model to stop in the middle.
    """
    tokenizer = text_format.tokenizer
    ends = tokenizer.convert_ids_to_tokens([text_format.response_end_id, text_format.text_end_id])
    if any(end in (example.prompt or "") or end in example.response for end in ends):
        return None
    if example.prompt is None:
        prompt_ids: list[int] = []
        before = list(text_format.start_ids)
        target = _ids(tokenizer, example.response)
        end_id = text_format.text_end_id
    else:
        prompt_ids, target = _prompt_and_response(text_format, example.prompt, example.response)
        before, end_id = prompt_ids, text_format.response_end_id
    if not target:
        return None
    target = [*target, end_id]
    cut = len(before) + len(target) > max_seq_length
    if cut and prompt_ids and len(target) < max_seq_length:
        before = before[-(max_seq_length - len(target)) :]
    elif cut:
        before = before[-(max_seq_length // 2) :]
        target = target[: max_seq_length - len(before)]
    shown = [IGNORED] * len(before) if prompt_ids else before
    labels = [*shown, *target]
    if all(label == IGNORED for label in labels[1:]):  # the first label predicts from nothing and is never used
        return None
    return Encoded([*before, *target], labels, prompt_ids, cut)


def _prompt_and_response(text_format: TextFormat, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Ids of both parts; the response is tokenised where it stands, unless it melts into the prompt."""
    text, start_ids = _render_prompt(text_format, prompt)
    prompt_ids = _ids(text_format.tokenizer, text)
    whole = _ids(text_format.tokenizer, text + response)
    if whole[: len(prompt_ids)] == prompt_ids:
        response_ids = whole[len(prompt_ids) :]
    else:
        response_ids = _ids(text_format.tokenizer, response)
    return [*start_ids, *prompt_ids], response_ids


def _render_prompt(text_format: TextFormat, prompt: str) -> tuple[str, tuple[int, ...]]:
    """The prompt's text, and the ids that go before it; a template writes its own bos."""
    if not text_format.has_template:
        return f"{prompt}\n\n", text_format.start_ids
    return _render(text_format.tokenizer, [*text_format.system, {"role": "user", "content": prompt}], True), ()


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, tokenize=False)
    assert isinstance(text, str)
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _shorter_system(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, str], ...]:
    user = {"role": "user", "content": _PROBE}
    empty = {"role": "system", "content": ""}
    try:
        with_empty = _render(tokenizer, [empty, user], True)
    except TemplateError:  # some templates refuse a system message
        return ()
    is_shorter = len(_ids(tokenizer, with_empty)) < len(_ids(tokenizer, _render(tokenizer, [user], True)))
    return (empty,) if is_shorter and _PROBE in with_empty else ()


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first special token that the template writes after a response, or eos where it writes none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    tail = _render(tokenizer, turns, False).rpartition(_PROBE)[2]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = [index for index in _ids(tokenizer, tail) if index in special or index in tokenizer.all_special_ids]
    return after[0] if after else tokenizer.eos_token_id
