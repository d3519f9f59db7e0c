"""A written example as token ids: the text as its tokenizer reads it, and which tokens are answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dylo_moe.data.control_tokens import ControlTokens
from dylo_moe.data.sources.examples import Fate, RowError

REWRITTEN = "earlier answers are not trained where the row does not hold them as a model would have given them"
"""What is noted of a row some of whose answers are only read."""


class Written(NamedTuple):
    """An example as text, not yet tokenised."""

    text: str
    answers: list[tuple[int, int]]
    """From which character to which each trained answer reaches, its end included; the last one ends the text."""
    hidden: Mapping[str, str]
    """The placeholders in the text, and the control tokens that they stand for."""
    note: str
    start_ids: tuple[int, ...] = ()
    """What is put before the text."""
    end_ids: tuple[int, ...] = ()
    """What is put behind a plain text, which is an answer as a whole."""
    begin_ids: tuple[int, ...] = ()
    """What no cut takes away, if the row begins with it."""

    def parts(self) -> list[str]:
        """The texts to tokenise: for each answer, from the end of the one before it, without and with the answer; and
        the whole."""
        found, last = [self.text], 0
        for start, end in self.answers:
            found += [self.text[last:start], self.text[last:end]]
            last = end
        return [text for text in found if text]


class TokenRow(NamedTuple):
    """A row before it is cut; `answers` are (start, end) spans of `ids`, the last with its end token."""

    ids: list[int]
    answers: list[tuple[int, int]]
    num_begin: int
    """The number of tokens at the start that no cut takes away."""
    note: str


def assemble(control: ControlTokens, written: Written, ids: Mapping[str, list[int]]) -> TokenRow:
    """Make the row of a written example, however long.

    Args:
        ids: the token ids of its `parts`, unless it has placeholders.

    Raises:
        RowError: for a last answer without a token.
    """
    found = None if written.hidden else _from_parts(written, ids)
    own, spans, note = found or _from_prefixes(control, written)
    whole = [*written.start_ids, *own, *written.end_ids]
    size = len(written.start_ids)
    answers = [(start + size, end + size) for start, end in spans]
    if answers[-1][1] - answers[-1][0] + len(written.end_ids) < 2:
        raise RowError(Fate.EMPTY, "its response has no token")
    if written.end_ids:
        answers = [(0, len(whole))]
    num_begin = len(written.begin_ids) if tuple(whole[: len(written.begin_ids)]) == written.begin_ids else 0
    return TokenRow(whole, answers, num_begin, joined(written.note, note))


def joined(*notes: str) -> str:
    """Several remarks as one, each once."""
    return "; ".join(dict.fromkeys(part for note in notes for part in note.split("; ") if part))


_Found = tuple[list[int], list[tuple[int, int]], str]


def _from_parts(written: Written, ids: Mapping[str, list[int]]) -> _Found | None:
    """The ids, the spans of the answers in them, and a note, put together answer by answer; None where a token spans a
    border, or the parts are not the whole."""
    whole: list[int] = []
    spans, last = [], 0
    for start, end in written.answers:
        before = ids[written.text[last:start]] if start > last else []
        part = ids[written.text[last:end]] if end > last else []
        if part[: len(before)] != before:
            return None
        spans.append((len(whole) + len(before), len(whole) + len(part)))
        whole += part
        last = end
    return (whole, spans, "") if len(spans) == 1 or whole == ids[written.text] else None


def _from_prefixes(control: ControlTokens, written: Written) -> _Found:
    """The same where the parts do not fit: each answer is trained whose prompt, tokenised by itself, begins the row.

    If a token spans the border between the last prompt and its answer, they are tokenised apart, as they are generated.
    """

    def read(text: str) -> list[int]:
        return control.ids_of(text, written.hidden) if written.hidden else ids_of_text(control.tokenizer, text)

    whole = read(written.text)
    start, _ = written.answers[-1]
    prompt = read(written.text[:start]) if start else []
    if whole[: len(prompt)] != prompt:
        whole = [*prompt, *read(written.text[start:])]
    spans, note = [], ""
    for start, end in written.answers[:-1]:
        before, behind = read(written.text[:start]), read(written.text[:end])
        if whole[: len(before)] == before and whole[: len(behind)] == behind:
            spans.append((len(before), len(behind)))
        else:
            note = REWRITTEN
    return whole, [*spans, (len(prompt), len(whole))], note


def ids_of_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one text, with nothing added."""
    return ids_of_texts(tokenizer, [text])[text]


def ids_of_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, list[int]]:
    """Token ids of each text, with nothing added; all at once is faster."""
    if not texts:
        return {}
    found = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return dict(zip(texts, found["input_ids"], strict=True))
