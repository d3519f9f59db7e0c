"""What one forward of a DyLoRAMoE model returns."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dylo_moe.routing.router import Routing


@dataclass
class DyLoRAMoEOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with the parts of the loss and the routing.

    loss = lm_loss + balance_coefficient * balance_loss + z_loss_coefficient * z_loss
           + entropy_coefficient * entropy_loss, where label smoothing enters `loss` alone; the parts are
           unweighted scalars, and None without labels. aux_loss is the sum of all but the first.

    Where the loss is computed in chunks (`DyLoRAMoE.loss_chunk_size`) there are no logits; token_losses, fp32
    [batch, seq], has the plain loss of each label at its place instead (0 where there is none), detached. With label
    smoothing lm_loss is detached then too.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    entropy_loss: Tensor | None = None
    routing: Routing | None = None
    token_losses: Tensor | None = None
    cache_params: Cache | None = None
    """What Mamba and its like return in the place of `past_key_values`."""


OWN_OUTPUTS = [field.name for field in fields(DyLoRAMoEOutput) if not hasattr(CausalLMOutputWithPast, field.name)]
"""The fields that the base's own output does not have."""
