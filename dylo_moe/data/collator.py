"""The collator, which pads rows of token ids into batches of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.encoding import IGNORED


class Collator:
    """Make a batch of rows, padded on the right. The attention mask marks the padding, so pad may equal eos.

    Returns `input_ids`, `attention_mask` and `labels`, each int64 [batch, longest row], and `domain`, int64 [batch].
    For packed rows there are also `position_ids` [batch, longest row], and `domain` has that shape too.

    Raises ValueError if the tokenizer has neither a pad nor an eos token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad_id is None:
            raise ValueError("the tokenizer has neither a pad nor an eos token; set tokenizer.pad_token")
        self.pad_id: int = pad_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(lists: list[list[int]], value: int) -> Tensor:
            return torch.tensor([[*items, *[value] * (longest - len(items))] for items in lists], dtype=torch.int64)

        batch = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
        if "position_ids" not in rows[0]:
            return {**batch, "domain": torch.tensor([row["domain"] for row in rows], dtype=torch.int64)}
        return {
            **batch,
            "position_ids": padded([row["position_ids"] for row in rows], 0),
            "domain": padded([row["domain"] for row in rows], 0),
        }
