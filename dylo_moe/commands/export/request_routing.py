"""Choose one expert for a whole request, by the router at the end of its prompt, for servers that do not route tokens.

The decision is the one of sequence granularity, whatever granularity the model was trained with.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import BASE, SHARED, UNIFORM


@torch.no_grad()
def experts_for(
    model: DyLoRAMoE, input_ids: Tensor, attention_mask: Tensor, *, prompt_lengths: Tensor
) -> tuple[str, ...]:
    """Choose the member of the pool with the largest weight at the last token of each prompt.

    It may be `base`, the unchanged model, or, where a shared expert serves that member's tokens too, "shared". With
    response granularity it is the base where a prompt does not end with the header of an answer.

    Args:
        input_ids: int64 [batch, seq], padded on the right.
        attention_mask: [batch, seq], 0 on padding.
        prompt_lengths: int64 [batch], in tokens.

    Raises:
        ValueError: for a router that sends every token to all experts with equal weights.
    """
    if model.router_config.policy == UNIFORM:
        raise ValueError("this router's policy is 'uniform', which prefers no expert, so none can be chosen")
    given = {"prompt_lengths": prompt_lengths} if model.router_config.per_sequence else {}
    routing = model.route(input_ids, attention_mask, **given)
    rows = torch.arange(len(input_ids), device=routing.weights.device)
    weights_BE = routing.weights[rows, prompt_lengths.to(rows.device) - 1]
    served = [SHARED if name == BASE and model.experts.shared is not None else name for name in routing.names]
    chosen = zip(weights_BE.max(-1).values.tolist(), weights_BE.argmax(-1).tolist(), strict=True)
    return tuple(served[place] if weight > 0 else BASE for weight, place in chosen)


def expert_for(model: DyLoRAMoE, prompt_ids: Sequence[int]) -> str:
    """Choose the member of the pool for a request with this prompt, as `experts_for` does for several."""
    if not prompt_ids:
        raise ValueError("prompt_ids is empty; a request needs at least one token to be routed by")
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    lengths = torch.tensor([ids.shape[1]], device=model.device)
    return experts_for(model, ids, torch.ones_like(ids), prompt_lengths=lengths)[0]
