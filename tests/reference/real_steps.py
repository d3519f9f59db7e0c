"""The memory that the tensors of a real step take, followed as `dylora plan` follows tensors without values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dylo_moe import DyLoRAMoE
from dylo_moe.base.stack import decoder_layers
from dylo_moe.commands.plan.step_activations import StepActivations, TensorTracker
from dylo_moe.training.metrics import Meter, token_losses


def step_activations(model: DyLoRAMoE, ids: Tensor) -> StepActivations:
    """Bytes that operations make in a forward and backward, at the two moments; at least two layers have experts."""
    tracker, at_lowest = _tracker(model.train()), []
    layers = decoder_layers(model.base)[1]
    above_lowest = layers[model.router_config.layer_index(len(layers)) + 1]

    def watch(module: Any, args: tuple) -> None:
        if args[0].requires_grad:
            args[0].register_hook(lambda _: at_lowest.append(tracker.restart()))

    above_lowest.register_forward_pre_hook(watch)
    for item in model.parameters():
        if item.requires_grad:
            item.register_post_accumulate_grad_hook(lambda item: tracker.leave_out([item.grad]))
    with tracker:
        _loss(model, ids).backward()
    return StepActivations(at_lowest[0], tracker.peak)


def evaluation_activations(model: DyLoRAMoE, ids: Tensor) -> int:
    """Bytes that operations make at most in a forward without gradients."""
    tracker = _tracker(model.eval())
    with torch.no_grad(), tracker:
        _loss(model, ids)
    return tracker.peak


def _tracker(model: DyLoRAMoE) -> TensorTracker:
    tracker = TensorTracker()
    tracker.leave_out([*model.parameters(), *model.buffers()])
    return tracker


def _loss(model: DyLoRAMoE, ids: Tensor) -> Tensor:
    """Of a batch with some padding, and with what the Trainer reads of it while its logits are there."""
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    losses, domain = token_losses(out, ids), torch.zeros(len(ids), dtype=torch.int64)
    Meter(["all"], model.router.names).add(losses=losses, labels=ids, routing=out.routing, domain=domain)
    return out.loss
