"""Tokens with a meaning of their own, such as `<|im_start|>`: only a template may write them, never a row's own text.

A row's text that holds such a token is written with placeholders while the template is at work, and its characters are
then tokenised as any other text's. So nobody can forge a turn, and no answer teaches a model to open one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.sources.examples import Fate, RowError

_FIRST_PLACEHOLDER = 0xF0000  # the first character of a plane for private use: no tokenizer and no template knows it


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of one tokenizer, made by `control_tokens`."""

    tokenizer: PreTrainedTokenizerBase
    ids: frozenset[int]
    special: frozenset[str]
    """Those that the tokenizer knows as special, as they are written."""
    pattern: re.Pattern[str] | None
    """Finds a control token in a text, the longest where several fit; None if there are none."""

    def hidden(self, texts: Iterable[str]) -> dict[str, str]:
        """A placeholder for each control token in these texts: a character that none of them holds -> the token."""
        if self.pattern is None:
            return {}
        whole = "\n".join(texts)
        found = dict.fromkeys(self.pattern.findall(whole))
        if not found:
            return {}
        unused = (character for character in map(chr, range(_FIRST_PLACEHOLDER, 0x110000)) if character not in whole)
        return dict(zip(unused, found, strict=False))

    def hide(self, value: Any, hidden: Mapping[str, str]) -> Any:
        """The same value, with placeholders for control tokens in every text of it, at any depth."""
        if isinstance(value, str):
            placeholders = {token: placeholder for placeholder, token in hidden.items()}
            return self.pattern.sub(lambda match: placeholders[match[0]], value) if self.pattern else value
        if isinstance(value, dict):
            return {self.hide(name, hidden): self.hide(item, hidden) for name, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
            return type(value)(*(self.hide(item, hidden) for item in value))
        if isinstance(value, (list, tuple)):
            return type(value)(self.hide(item, hidden) for item in value)
        return value

    def ids_of(self, text: str, hidden: Mapping[str, str]) -> list[int]:
        """Token ids of a text with placeholders: what they stand for is tokenised as plain characters.

        Raises:
            RowError: where this tokenizer cannot write the token's characters without the token.
        """
        refusal = RowError(Fate.MALFORMED, f"{held(hidden)}, which this tokenizer cannot write as plain characters")
        if not self.tokenizer.is_fast:
            raise refusal
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        marked, places = found["input_ids"], [*found["offset_mapping"], (len(text), len(text))]
        # the tokenizer itself can read its special tokens as characters; for others it takes a costly copy
        plain_ids = self._ids_of_characters if self.special.issuperset(hidden.values()) else self._ids_of_copy
        ids: list[int] = []
        last_place = last_end = 0
        stops = [place for place, index in enumerate(marked) if index in self.ids]
        for place in [*stops, len(marked)]:  # between two control tokens, a tokenizer reads a text by itself
            start, end = places[place]
            part, part_ids = text[last_end:start], marked[last_place:place]
            if any(placeholder in part for placeholder in hidden):
                if plain_ids(part) != part_ids:
                    raise refusal
                for placeholder, token in hidden.items():
                    part = part.replace(placeholder, token)
                part_ids = plain_ids(part)
                if not self.ids.isdisjoint(part_ids):
                    raise refusal
            ids += [*part_ids, *marked[place : place + 1]]
            last_place, last_end = place + 1, end
        return ids

    def _ids_of_characters(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _ids_of_copy(self, text: str) -> list[int]:
        return list(self._copy.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _copy(self) -> Tokenizer:
        """A copy of the tokenizer that reads all control tokens as plain characters."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:  # others, such as runs of spaces, are ordinary text
            token["special"] = token["id"] in self.ids
        copy = Tokenizer.from_str(json.dumps(state))
        copy.encode_special_tokens = True
        return copy


def control_tokens(tokenizer: PreTrainedTokenizerBase, templates: Sequence[str]) -> ControlTokens:
    """Find the control tokens of a tokenizer: its special ones, and added ones that a template writes.

    Args:
        templates: the sources of its chat templates, and texts that they wrote.
    """
    texts: dict[str, int] = {}
    known: set[str] = set()
    special = set(tokenizer.all_special_ids)
    for index, token in tokenizer.added_tokens_decoder.items():
        content = token.content
        is_written = bool(content.strip()) and any(content in template for template in templates)
        if content and (token.special or index in special or is_written):
            texts[content] = index
            known |= {content} if token.special else set()
    pattern = re.compile(_any_of(texts)) if texts else None
    return ControlTokens(tokenizer, frozenset(texts.values()), frozenset(known), pattern)


def held(hidden: Mapping[str, str]) -> str:
    """Say which control tokens a row holds."""
    return f"it holds {', '.join(sorted(hidden.values()))}"


def _any_of(texts: Iterable[str]) -> str:
    """A pattern of all texts, longest first. It branches by characters: some tokenizers have thousands of tokens."""
    branches: dict[str, list[str]] = {}
    for text in texts:
        branches.setdefault(text[:1], []).append(text[1:])
    ends_here = branches.pop("", None) is not None
    patterns = [re.escape(first) + _any_of(rests) for first, rests in branches.items()]
    if len(patterns) == 1 and not ends_here:
        return patterns[0]
    return f"(?:{'|'.join(patterns)}){'?' if ends_here else ''}" if patterns else ""
