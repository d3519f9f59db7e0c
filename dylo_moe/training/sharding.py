"""A base in parts: each rank holds a share of the frozen weights, and all of what is trained.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv:2304.11277, and Rajbhandari et al. 2020,
arXiv:1910.02054, for the idea) gathers a decoder layer's weights right before they are needed and drops them after.
We differ in what is sharded: only the base, which is nearly all there is and never has a gradient. Experts and router
stay whole on every rank, so that the optimizer's state and a checkpoint are the same with and without sharding, and
their gradients are averaged once a step, when the backward is over: DistributedDataParallel would send them in between,
in an order that depends on which experts a rank's tokens chose, and so would wait for ever for the gathering of layers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from typing import Any, NamedTuple

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import distributed, nn
from torch.distributed import device_mesh, fsdp

from dylo_moe.base.fingerprint import SHARDED, fingerprint
from dylo_moe.base.frozen import decoder_layers
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.utils.distributed import differing, num_ranks

ACCELERATE_SWITCH = "ACCELERATE_USE_FSDP"
"""How `accelerate launch --use_fsdp` tells it to Transformers and to Accelerate, neither of which is to act on it."""

EMPTY_ELSEWHERE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""How it tells Transformers to load the base on the first rank alone. Here each reads it, and keeps its share."""


class Sharding(NamedTuple):
    """How the base is sharded."""

    reshard_after_forward: bool
    """Drop a layer's weights after its forward and gather them again for its backward; else in between they stay."""
    cpu_offload: bool
    """Keep the shares in the memory of the host."""
    layer_classes: tuple[str, ...]
    """What the user says a decoder layer is called; empty: nothing."""


def take_sharding(arguments: Any, *, num_processes: int) -> Sharding | None:
    """What --fsdp or `accelerate launch --use_fsdp` asks for; they are taken back, as the Trainer is to see DDP alone.

    Args:
        arguments: `transformers.TrainingArguments`.
        num_processes: that share the base.

    Raises:
        ValueError: for what cannot be done, every reason at once.
    """
    asked = arguments.fsdp_plugin_args
    if os.environ.get(ACCELERATE_SWITCH, "false").lower() == "true" and asked is None:
        asked = {}  # Accelerate has put all of it into the environment
    if asked is None:
        return None
    plugin = FullyShardedDataParallelPlugin(**{**asked, "cpu_ram_efficient_loading": False})
    problems = _problems(plugin, num_processes)
    if problems:
        raise ValueError("FSDP cannot be used so: " + "; ".join(problems))
    arguments.fsdp, arguments.fsdp_plugin_args = None, None
    for name in {ACCELERATE_SWITCH, EMPTY_ELSEWHERE} & os.environ.keys():
        os.environ[name] = "false"
    return Sharding(
        reshard_after_forward=bool(plugin.reshard_after_forward),
        cpu_offload=isinstance(plugin.cpu_offload, fsdp.CPUOffloadPolicy),
        layer_classes=tuple(plugin.transformer_cls_names_to_wrap or ()),
    )


def _problems(plugin: FullyShardedDataParallelPlugin, num_processes: int) -> list[str]:
    problems = []
    if plugin.fsdp_version != 2:
        problems.append(f"its version is {plugin.fsdp_version}, which is on its way out; set it to 2")
    if num_processes == 1:
        problems.append(
            "there is one process, which has nobody to share with; start with torchrun or accelerate launch"
        )
    if plugin.activation_checkpointing:
        problems.append("its activation_checkpointing would lose the routing; use --gradient_checkpointing")
    policy = getattr(plugin.auto_wrap_policy, "__name__", "")
    if plugin.auto_wrap_policy is not None and "transformer" not in policy:
        problems.append(f"auto_wrap_policy is {policy}; what is gathered is a decoder layer (TRANSFORMER_BASED_WRAP)")
    if plugin.mixed_precision_policy is not None:
        problems.append("mixed_precision_policy is given; --bf16 says in which dtype the base is held")
    if plugin.ignored_modules is not None:
        problems.append("ignored_modules is given, but all of the base is sharded and nothing else")
    return problems


def shard_base(model: DyLoRAMoE, sharding: Sharding, *, device: torch.device) -> None:
    """Leave each rank its share of the base, on `device`; experts and router move there whole.

    Raises:
        ValueError: for a quantised base, an older PyTorch, or ranks that loaded different bases.
    """
    base = model.base
    if getattr(base, "hf_quantizer", None) is not None:
        raise ValueError("a quantised base cannot be sharded; leave FSDP out (each process then holds all of it)")
    if not hasattr(fsdp, "fully_shard") or "ignored_params" not in inspect.signature(fsdp.fully_shard).parameters:
        raise ValueError(f"sharding the base needs PyTorch 2.7 or newer; this is {torch.__version__}")
    _, layers = decoder_layers(base)
    kinds = {type(layer).__name__ for layer in layers}
    if sharding.layer_classes and not kinds >= {*sharding.layer_classes}:
        raise ValueError(
            f"transformer_layer_cls_to_wrap is {', '.join(sharding.layer_classes)}, but this base is gathered by its "
            f"decoder layers, {', '.join(sorted(kinds))}; leave it out"
        )
    known = fingerprint(base)
    others = differing(hashlib.sha256(json.dumps(known).encode()).hexdigest())
    if others:
        raise ValueError(
            f"ranks {', '.join(map(str, others))} loaded another base than rank 0; give all the same files"
        )
    own = {parameter for name, parameter in base.named_parameters() if ".lora_" in name}
    options: dict[str, Any] = {
        "mesh": device_mesh.init_device_mesh(device.type, (num_ranks(),)),
        "ignored_params": own,
    }
    if sharding.cpu_offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy()
    for layer in layers:
        fsdp.fully_shard(layer, reshard_after_forward=sharding.reshard_after_forward, **options)
    fsdp.fully_shard(base, **options)
    setattr(base, SHARDED, known)
    for parameter in own:
        parameter.data = parameter.data.to(device)
    model.router.to(device)
    model.experts.pack()
    for tensor in (*_learning(model), *model.router.buffers()):
        distributed.broadcast(tensor.data, src=0)


@torch.no_grad()
def average_gradients(model: DyLoRAMoE) -> None:
    """Give experts and router the mean over the ranks of their gradients; what no rank has a gradient of keeps none."""
    parameters = _learning(model)
    has_gradient = torch.tensor(
        [float(p.grad is not None) for p in parameters], device=model.router.feature_mean.device
    )
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for tensor in (has_gradient, flat):
        distributed.all_reduce(tensor)
    means = flat.div_(num_ranks()).split([p.numel() for p in parameters])
    for parameter, mean, count in zip(parameters, means, has_gradient.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)  # laid out alike, as fused optimizers take for granted
            parameter.grad.copy_(mean.view_as(parameter))


def _learning(model: DyLoRAMoE) -> list[nn.Parameter]:
    """What is trained, in the same order on every rank."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_base` was there."""
    return isinstance(model, DyLoRAMoE) and SHARDED in vars(model.base)
