"""Generate texts with the base itself, from which the base's own entry of the skill library is estimated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dylo_moe.routing.turn_tokens import TurnTokens
from dylo_moe.routing.turns import find_answers

WRITTEN_TEXTS, WRITTEN_TOKENS = 64, 96


@torch.no_grad()
def write_texts(model: Any, *, seed: int) -> Tensor:
    """Sample texts from a model without a prompt, each from a random first token.

    Half of the first tokens are drawn by rank, for the ids of most vocabularies go by frequency (probability
    1 / (id + 50)), half evenly.

    Args:
        model: any causal language model; random state and mode stay as they were.
        seed: the seed of the first tokens and of the sampling.

    Returns:
        int64 [64, 96].
    """
    size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    by_rank = torch.multinomial(1.0 / (torch.arange(size) + 50.0), WRITTEN_TEXTS // 2, True, generator=generator)
    first = torch.cat([by_rank, torch.randint(size, (WRITTEN_TEXTS // 2,), generator=generator)])[:, None]
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return model.generate(
                input_ids=first.to(model.device),
                attention_mask=torch.ones_like(first).to(model.device),
                min_new_tokens=WRITTEN_TOKENS - 1,
                max_new_tokens=WRITTEN_TOKENS - 1,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
    finally:
        model.train(was_training)


def as_prompts(batch: dict[str, Tensor], turns: TurnTokens) -> dict[str, Tensor]:
    """A batch in which an answer begins behind each row that has none, so that plain texts are judged as prompts.

    Args:
        batch: input_ids [batch, seq] and, where padded, attention_mask.
        turns: what opens an answer.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    is_plain_B1 = ~find_answers(ids, mask=mask.bool(), turns=turns).openings.any(1, keepdim=True)
    opening = torch.tensor(turns.recognised, device=ids.device).expand(len(ids), -1)
    return {
        "input_ids": torch.cat([ids, opening], 1),
        "attention_mask": torch.cat([mask, is_plain_B1.expand_as(opening).to(mask)], 1),
    }
