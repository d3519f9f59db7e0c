"""A sharded base: each rank holds a share of the frozen weights, and all of the weights that are trained.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv:2304.11277, and Rajbhandari et al. 2020,
arXiv:1910.02054, for the idea) gathers a decoder layer's weights right before they are needed and drops them after.
We differ in what is sharded: only the base, which has nearly all parameters and never a gradient. Experts and router
stay whole on every rank, so that the optimizer's state and a checkpoint are the same with and without sharding, and
their gradients are averaged once a step, when the backward is over: DistributedDataParallel would send them in between,
in an order that depends on which experts a rank's tokens chose, and would deadlock with the gathering of layers.
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
from dylo_moe.base.stack import decoder_layers
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.utils.distributed import differing, num_ranks

ACCELERATE_SWITCH = "ACCELERATE_USE_FSDP"
"""The variable by which `accelerate launch --use_fsdp` asks Transformers and Accelerate to shard; neither should."""

EMPTY_ELSEWHERE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""The variable by which it asks Transformers to load the base on rank 0 alone. Here each rank loads it and keeps its
share."""


class Sharding(NamedTuple):
    """How the base is sharded."""

    reshard_after_forward: bool
    """Drop a layer's weights after its forward and gather them again for its backward; else keep them in between."""
    cpu_offload: bool
    """Keep the shares in the memory of the host."""
    layer_classes: tuple[str, ...]
    """The class names of decoder layers as the user gave them; empty: not given."""


def take_sharding(arguments: Any, *, num_processes: int) -> Sharding | None:
    """Read what --fsdp or `accelerate launch --use_fsdp` asks for, and hide it from the Trainer, which is to see DDP.

    Args:
        arguments: `transformers.TrainingArguments`.
        num_processes: how many processes share the base.

    Raises:
        ValueError: for a request that cannot be met, with every reason.
    """
    asked = arguments.fsdp_plugin_args
    if os.environ.get(ACCELERATE_SWITCH, "false").lower() == "true" and asked is None:
        asked = {}  # Accelerate has put the whole request into the environment
    if asked is None:
        return None
    plugin = FullyShardedDataParallelPlugin(**{**asked, "cpu_ram_efficient_loading": False})
    problems = _problems(plugin, num_processes)
    if problems:
        raise ValueError("FSDP cannot be used so: " + "; ".join(problems))
    arguments.fsdp, arguments.fsdp_plugin_args = None, None
    arguments.shards_base = True
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
        problems.append(f"its version is {plugin.fsdp_version}, which PyTorch is retiring; set it to 2")
    if num_processes == 1:
        problems.append(
            "there is one process, and nothing to share the base with; start with torchrun or accelerate launch"
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
    """Shard the base, so that each rank keeps its share on `device`; experts and router move there whole.

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
    """Replace the gradients of experts and router by their mean over the ranks; a parameter without a gradient on any
    rank keeps none."""
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
                parameter.grad = torch.empty_like(parameter)  # fused optimizers expect the parameter's layout
            parameter.grad.copy_(mean.view_as(parameter))


class ShardedModel(nn.Module):
    """Wraps a model with a sharded base, whose gradients `average_gradients` handles, so that nothing else wraps it.

    The Trainer takes anything but its own model for wrapped already, and leaves it alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.module(*args, **kwargs)


def _learning(model: DyLoRAMoE) -> list[nn.Parameter]:
    """The parameters that are trained, in the same order on every rank."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_base` has sharded the base of this model."""
    return isinstance(model, DyLoRAMoE) and SHARDED in vars(model.base)
