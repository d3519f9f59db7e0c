"""Several texts in one row, kept apart: less padding for the same texts.

Texts are packed best-fit decreasing (as in Ding et al. 2024, arXiv:2404.10830): the longest first, each into the
fullest row that still has room, so no text is cut.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from dylo_moe.data.config import DataConfig
from dylo_moe.data.encoding import IGNORED

WINDOW = 100_000
"""The most texts that are packed together: it bounds memory, and roughly keeps an epoch's order."""


class PackedTexts(torch.utils.data.Dataset):
    """Rows of several texts each, put together when they are read.

    An item holds `input_ids`, `labels`, `position_ids` (which start over with each text) and `domain` (of each token),
    lists as long as the row. The first token of a text is not trained: it would be predicted from another text.

    Args:
        texts: rows with `input_ids`, `labels`, `length` and `domain`.
        max_seq_length: the most tokens of a row; no text may be longer.
    """

    def __init__(self, texts: Dataset, max_seq_length: int) -> None:
        self.texts = texts
        self.max_seq_length = max_seq_length
        self.lengths = np.asarray(texts.with_format("numpy")["length"][:])
        self.rows = pack_lengths(self.lengths, max_seq_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "domain": []}
        for place in self.rows[index]:
            text = self.texts[int(place)]
            length = len(text["input_ids"])
            row["input_ids"] += text["input_ids"]
            row["labels"] += [IGNORED, *text["labels"][1:]]
            row["position_ids"] += range(length)
            row["domain"] += [text["domain"]] * length
        return row

    @property
    def fill(self) -> float:
        """The share of tokens that are text, if every row were padded to `max_seq_length`."""
        return float(self.lengths.sum()) / (len(self.rows) * self.max_seq_length)


def pack_lengths(lengths: NDArray[np.integer], capacity: int) -> list[NDArray[np.int64]]:
    """Pack texts of [N] lengths into rows of at most `capacity` tokens.

    Returns:
        The indices of each row's texts; the rows come in the order of their first texts.

    Raises:
        ValueError: for a length over the capacity.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a text of {lengths.max()} tokens does not fit into a row of {capacity}")
    rows: list[NDArray[np.int64]] = []
    for start in range(0, len(lengths), WINDOW):
        window = _pack_window(np.asarray(lengths[start : start + WINDOW]), capacity)
        rows += [np.asarray(sorted(row)) + start for row in window]
    return rows


def _pack_window(lengths: NDArray[np.integer], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the room that they have left
    rooms = 0  # bit r: some row has room r
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room = len(rows), capacity
            rows.append([])
        rows[row].append(place)
        with_room.setdefault(room - length, []).append(row)
        rooms |= 1 << (room - length)
    return sorted(rows, key=min)


@torch.no_grad()
def check_texts_kept_apart(model: Any, base: PreTrainedModel) -> None:
    """Check that a model keeps packed texts apart, on two rows of different length, padded as in training.

    A text's logits must not depend on the text before it in the row, and must be those of the text alone. The model is
    run, because the name of its attention would not tell what else mixes tokens.

    Args:
        model: called with `input_ids`, `attention_mask` and `position_ids`, all int64 [2, seq].
        base: the base model, whose attention is named in the message.

    Raises:
        ValueError: if one text changes another's logits.
    """
    weight = cast(Tensor, base.get_input_embeddings().weight)
    device, size = weight.device, len(weight)
    lengths = ((7, 9), (5, 6))
    generator = torch.Generator().manual_seed(0)
    first, other, second = (
        [torch.randint(0, size, (row[place],), generator=generator) for row in lengths] for place in (0, 0, 1)
    )

    def logits(rows: list[list[Tensor]]) -> Tensor:
        def padded(parts: list[Tensor]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)

        return model(
            input_ids=padded([torch.cat(row) for row in rows]),
            attention_mask=padded([torch.ones(sum(map(len, row)), dtype=torch.int64) for row in rows]),
            position_ids=padded([torch.cat([torch.arange(len(text)) for text in row]) for row in rows]),
            use_cache=False,
        ).logits.float()

    was_training = model.training
    model.eval()
    try:
        packed, changed = (
            logits([[before, after] for before, after in zip(texts, second, strict=True)]) for texts in (first, other)
        )
        alone = [logits([[text]])[0] for text in second]
    finally:
        model.train(was_training)
    precision = torch.finfo(weight.dtype).eps
    for row, (start, length) in enumerate(lengths):
        text = slice(start, start + length)
        scale = alone[row].abs().max()
        seen = (packed[row, text] - changed[row, text]).abs().max() / scale  # same shapes, so hardly any rounding
        moved = (packed[row, text] - alone[row]).abs().max() / scale  # other shapes, so some rounding
        if seen > 4 * precision or moved > max(16 * precision, 1e-5):
            name = getattr(base.config, "_attn_implementation", None)
            raise ValueError(
                f"packing cannot be used: with attention {name!r}, {type(base).__name__} lets texts in one row see "
                f"each other (logits move by {float(max(seen, moved)):.2g} of their size). Leave --packing out"
            )


def padding_share(lengths: NDArray[np.integer], batch_size: int, *, seed: int = 0) -> float:
    """The share of tokens that is padding if [N] lengths are put into random batches, each padded to its longest."""
    shuffled = np.random.default_rng(seed).permutation(lengths)
    batches = [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]
    padded = sum(int(batch.max()) * len(batch) for batch in batches)
    return 1 - float(shuffled.sum()) / padded


def epoch_of(texts: Dataset, config: DataConfig) -> Dataset | PackedTexts:
    """The dataset that the Trainer is given: the texts, or with `packing` rows of several texts each."""
    return PackedTexts(texts, config.max_seq_length) if config.packing else texts
