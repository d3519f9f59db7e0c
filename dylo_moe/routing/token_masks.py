"""Find out which tokens of a batch are padding, where packed texts begin, and where a prompt ends.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dylo_moe.utils.words import counted

PROMPT_TOKENS = 32
"""The number of first real tokens that count as a text's prompt where nothing says how long it is."""


def token_mask(attention_mask: Tensor | None, *, batch: int, seq: int, device: torch.device) -> Tensor:
    """bool [batch, seq]: which of this call's tokens are real.

    Args:
        attention_mask: [batch, cached + seq], 0 on padding; None: no padding.
    """
    if attention_mask is None:
        return torch.ones(batch, seq, dtype=torch.bool, device=device)
    return attention_mask[:, attention_mask.shape[1] - seq :].bool()


def text_starts(position_ids: Tensor | None, *, mask: Tensor) -> Tensor | None:
    """bool [batch, seq]: where another text begins behind the one before, in a packed row.

    As in Transformers, a new text begins where the position ids do not continue by one.

    Args:
        position_ids: [batch or 1, seq]; None, or of another shape: nothing is packed.
        mask: bool [batch, seq], False on padding.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != mask.shape[1] or mask.shape[1] == 1:
        return None
    jumps_BS = position_ids[:, 1:] - position_ids[:, :-1] != 1
    return F.pad(jumps_BS & mask[:, 1:] & mask[:, :-1], (1, 0))


def prompt_ends(
    mask: Tensor,
    *,
    starts: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """int64 [batch, seq]: for each token, where the last token of its text's prompt stands.

    The prompt is `prompt_lengths` tokens where given, else the tokens before the text's first label that is
    not -100, else (no such label, or at most one token before it: the first token of a plain text has no label where
    texts are packed, as nothing predicts it) its first 32 real tokens.

    Args:
        mask: bool [batch, seq], False on padding.
        starts: bool [batch, seq], where another packed text begins; None: one text a row.
        prompt_lengths: int64 [batch], in real tokens.
        labels: int64 [batch, seq].

    Raises:
        ValueError: for a prompt length of less than 1 or more than the row's real tokens, or for packed rows.
    """
    text_BS = torch.zeros_like(mask, dtype=torch.int64) if starts is None else starts.cumsum(1)

    def of_text(values_BS: Tensor, reduce: str) -> Tensor:
        """Reduce over each token's own text, with the result at each of its tokens."""
        reduced_BS = torch.zeros_like(values_BS).scatter_reduce(1, text_BS, values_BS, reduce, include_self=False)
        return reduced_BS.gather(1, text_BS)

    real_BS = mask.long()
    before_BS = real_BS.cumsum(1) - real_BS
    ordinal_BS = before_BS - of_text(before_BS, "amin")
    count_BS = of_text(real_BS, "sum")
    if prompt_lengths is not None:
        _check_prompt_lengths(prompt_lengths, real_BS.sum(1), text_BS)
        length_BS = prompt_lengths.to(mask.device)[:, None].expand_as(count_BS)
    else:
        length_BS = count_BS.clamp(max=PROMPT_TOKENS)
        if labels is not None:
            none = mask.shape[1]
            first_BS = of_text(torch.where((labels != -100) & mask, ordinal_BS, none), "amin")
            length_BS = torch.where((first_BS > 1) & (first_BS < none), first_BS, length_BS)
    position_BS = torch.arange(mask.shape[1], device=mask.device).expand_as(text_BS)
    return of_text(torch.where(mask & (ordinal_BS == length_BS - 1), position_BS, 0), "amax")


def _check_prompt_lengths(prompt_lengths: Tensor, count_B: Tensor, text_BS: Tensor) -> None:
    if not isinstance(prompt_lengths, Tensor) or prompt_lengths.dtype not in (torch.int64, torch.int32):
        kind = getattr(prompt_lengths, "dtype", type(prompt_lengths).__name__)
        raise ValueError(f"prompt_lengths is {kind}; it must be an int64 tensor [{len(count_B)}]")
    if prompt_lengths.shape != count_B.shape:
        raise ValueError(f"prompt_lengths has shape {list(prompt_lengths.shape)}; it must be [{len(count_B)}]")
    lengths, counts = prompt_lengths.tolist(), count_B.tolist()
    wrong = [
        f"row {row} has {counted(count, 'token')} and a prompt length of {length}"
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True))
        if count and not 1 <= length <= count
    ]
    if wrong:
        raise ValueError(f"prompt_lengths must be from 1 to each row's real tokens: {'; '.join(wrong[:3])}")
    if (text_BS > 0).any():
        raise ValueError("prompt_lengths cannot say where the prompts of packed rows end; labels can")


def prompt_mask(input_ids: Tensor, *, pad: int | None, ends: Sequence[int]) -> Tensor:
    """int64 [batch, seq] attention mask of prompts that came without one.

    As Transformers infers it: padding is recognised by its token, unless that token also ends texts.
    """
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


def finished_mask(sequences: Tensor, prompt: Tensor, *, ends: Sequence[int]) -> Tensor:
    """bool [rows, seq] of generated sequences: the prompt's real tokens, and new ones up to each row's first end.

    Args:
        sequences: int64 [rows, seq]; the rows of each prompt are consecutive.
        prompt: [prompts, prompt tokens] attention mask.
    """
    new = sequences[:, prompt.shape[1] :]
    ended = torch.zeros_like(new, dtype=torch.bool)
    for end in ends:
        ended |= new == end
    before_end = (ended.cumsum(1) - ended.long()) == 0
    rows = sequences.shape[0] // prompt.shape[0]
    return torch.cat([prompt.repeat_interleave(rows, 0).bool(), before_end], 1)


def as_list(value: Any) -> list[int]:
    """Token ids as a generation config holds them: none, one, several, or a tensor."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return value.flatten().tolist()
    return list(value) if isinstance(value, (list, tuple)) else [value]
