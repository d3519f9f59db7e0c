"""The pool: add, freeze, mature and remove experts. Each is one ordinary PEFT LoRA adapter."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners import lora
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .dispatch import ContextSlot, ExpertShape
from .frozen import decoder_layers
from .layer import ROUTED_CLASSES, RoutedLayer, compute_dtype, pack

NAME_RULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED_NAMES = {"base", "default", "base_model", "lora_A", "lora_B"}
TAKEN_BY_TORCH = frozenset([*dir(nn.ModuleDict()), *dir(nn.ParameterDict()), "weight", "bias"])
LORA_FIELDS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping",
    "peft_version", "runtime_config",
}  # fmt: skip
"""The fields of `LoraConfig` that an expert may set; any other that is not at its default is refused."""

WHY_NOT = {
    "use_dora": "DoRA rescales the whole weight, so its experts cannot be summed token by token",
    "target_parameters": "raw parameters have no layer of their own to route",
    "lora_bias": "a bias of an expert cannot be weighted with the stacked products",
    "bias": "training the base's biases would change the frozen base",
    "modules_to_save": "a trained copy of a base module would change the base for every expert",
}


@dataclass
class Expert:
    """One expert of the pool, as `model.experts` shows it."""

    name: str
    rank: int
    mature: bool
    """False while it is nascent: one nascent expert makes routing dense."""
    trainable: bool
    """Whether its adapter and its gate row receive gradients."""
    parameters: int
    """Number of its adapter's parameters."""
    skill: str | None = None
    """The kind of data it was grown for, when it was."""


class ExpertPool:
    """All experts of a model, in gate order, on one PeftModel.

    Args:
        model: the PeftModel whose adapters are the experts.
        slot: what its routed linears share.
        lora: the first expert's config; `add` derives the others from it.
    """

    def __init__(self, model: PeftModel, slot: ContextSlot, lora: LoraConfig) -> None:
        self._model = model
        self._slot = slot
        self.lora = lora
        """What the next expert is made of."""
        self._experts: dict[str, Expert] = {}
        self.layers: tuple[RoutedLayer, ...] = ()
        """The routed linears, in the model's order."""
        self.layouts: frozenset[tuple[ExpertShape, ...]] = frozenset()
        """The distinct `expert_shapes` of the routed linears."""

    def __iter__(self) -> Iterator[Expert]:
        return iter(self._experts.values())

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, key: str | int) -> Expert:
        """An expert by name or by position. Raises ValueError for an unknown name."""
        if isinstance(key, int):
            return list(self._experts.values())[key]
        if key not in self._experts:
            raise ValueError(f"there is no expert {key!r}; the pool has {', '.join(self._experts)}")
        return self._experts[key]

    def __contains__(self, name: object) -> bool:
        return name in self._experts

    def __repr__(self) -> str:
        return f"ExpertPool({list(self._experts.values())!r})"

    @property
    def names(self) -> tuple[str, ...]:
        """In gate order."""
        return tuple(self._experts)

    @property
    def has_nascent(self) -> bool:
        """Whether some expert is still learning, which makes routing dense."""
        return any(not expert.mature for expert in self)

    def config_for(self, rank: int | None) -> LoraConfig:
        """The pool's LoRA config at another rank; alpha follows, so that the scaling stays."""
        config = copy.deepcopy(self.lora)
        if rank is not None and rank != config.r:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"rank is {rank!r}; it must be a whole number of at least 1")
            if config.rank_pattern or config.alpha_pattern:
                raise ValueError(
                    f"rank {rank} cannot apply: the pool's rank_pattern or alpha_pattern sets them by layer"
                )
            ratio = (rank / config.r) ** (0.5 if config.use_rslora else 1.0)
            alpha = config.lora_alpha * ratio
            config.lora_alpha = int(alpha) if float(alpha).is_integer() else alpha
            config.r = rank
        return config

    def register(self, name: str, *, mature: bool, skill: str | None = None) -> Expert:
        """Take an adapter that the PeftModel already has into the pool, as its last expert."""
        rank = cast(LoraConfig, self._model.peft_config[name]).r
        self._experts[name] = Expert(name, rank, mature, True, 0, skill)
        self.refresh()
        return self._experts[name]

    def add(self, name: str, config: LoraConfig, *, mature: bool, skill: str | None = None) -> Expert:
        """Inject a fresh adapter and take it into the pool, as its last expert.

        It has no memory before `pack`, so that adding many at once allocates each layer's block once.
        """
        check_name(name, taken=self._experts, modules=self._base_modules())
        PeftModel.add_adapter(self._model, name, config, low_cpu_mem_usage=True)
        return self.register(name, mature=mature, skill=skill)

    def _base_modules(self) -> Iterator[str]:
        paths = (path for path, _ in cast(nn.Module, self._model.base_model.model).named_modules())
        return (path for path in paths if ".lora_" not in path)

    def cast(self, name: str, dtype: torch.dtype) -> None:
        """Bring an expert's matrices to a dtype; to be packed again."""
        for parameter in self.parameters(name):
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)

    def remove(self, name: str) -> None:
        """Delete an expert's adapter. The last one of a pool cannot be removed."""
        if len(self) == 1:
            raise ValueError(f"{self[name].name!r} is the only expert; a pool needs at least one")
        del self._experts[self[name].name]
        PeftModel.delete_adapter(self._model, name)
        self.refresh()
        self.pack()

    def refresh(self) -> None:
        """After any change of the adapters: routed classes, shapes and trainability; `pack` follows for the storage."""
        layers = [layer for _, layer in routed_layers(self._model)]
        for layer in layers:
            routed = ROUTED_CLASSES.get(type(layer))
            if routed is not None:
                layer.__class__ = routed
            layer.bind(self._slot, self._experts)
        self.layers = tuple(layers)
        self.layouts = frozenset(layer.expert_shapes for layer in layers)
        for expert in self:
            expert.parameters = sum(parameter.numel() for parameter in self.parameters(expert.name))
        self.apply_trainable()

    def compute_dtype(self) -> torch.dtype:
        """What the adapters are computed in at this moment: their dtype, or autocast's."""
        return compute_dtype(next(self.parameters(self.names[0])))

    def apply_trainable(self) -> None:
        """PEFT resets `requires_grad` in many of its methods; this puts our policy back."""
        for parameter in self._model.base_model.parameters():
            parameter.requires_grad_(False)
        for expert in self:
            for parameter in self.parameters(expert.name):
                parameter.requires_grad_(expert.trainable)

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The A and B matrices of one expert, layer by layer."""
        for layer in self.layers:
            if name in layer.adapters:
                yield cast(nn.Parameter, layer.adapters[name].down.weight)
                yield cast(nn.Parameter, layer.adapters[name].up.weight)

    def pack(self) -> None:
        """Lay each layer's experts behind one another in memory, after some were added, removed or moved."""
        for layer in self.layers:
            for name in pack(layer):
                config = cast(LoraConfig, self._model.peft_config[name])
                cast(Any, layer).reset_lora_parameters(name, config.init_lora_weights)


def routed_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted linears of a model, with their module names."""
    for name, module in model.named_modules():
        if isinstance(module, (RoutedLayer, lora.LoraLayer)):
            yield name, module


def check_name(name: object, *, taken: Any = (), modules: Iterable[str] = ()) -> None:
    """Raises ValueError unless `name` can be an expert: a folder, a module and a part of state-dict keys.

    Args:
        taken: names of other experts.
        modules: of the base, with dots; PEFT cannot tell an expert from a module of the same name.
    """
    if not isinstance(name, str) or not NAME_RULE.fullmatch(name) or name in RESERVED_NAMES:
        raise ValueError(
            f"expert name is {name!r}; it must be 1 to 64 letters, digits, '_' or '-', begin with a letter or "
            f"digit, and not be one of {', '.join(sorted(RESERVED_NAMES))}"
        )
    parts = {part for module in modules for part in module.split(".")}
    if name in TAKEN_BY_TORCH or name in parts:
        raise ValueError(f"expert name is {name!r}, which modules of the model or of torch have; choose another name")
    if name in taken:
        raise ValueError(f"there is already an expert {name!r}; choose another name")


def routed_lora_config(base: PreTrainedModel, config: LoraConfig, *, router_index: int) -> LoraConfig:
    """A copy of `config` that adapts linears of the routed layers only, checked before anything changes.

    "all-linear" (or no target at all) becomes the names of all linears inside the routed layers.

    Raises:
        ValueError: with every reason why this config cannot make a routed expert.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"lora is {config!r}, a {type(config).__name__}; experts are made of a peft.LoraConfig")
    config = copy.deepcopy(config)
    problems = _unsupported_fields(config)
    prefix, layers = decoder_layers(base)
    inside = {
        f"{prefix}.{index}.{name}": index
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        config.target_modules = sorted({name.rsplit(".", 1)[1] for name in inside})
    if router_index > 0 and config.layers_to_transform is None and not isinstance(config.target_modules, str):
        config.layers_to_transform = list(range(router_index, len(layers)))
        config.layers_pattern = prefix.rsplit(".", 1)[-1]
    targeted = [name for name, _ in base.named_modules() if name and check_target_module_exists(config, name)]
    outside = [name for name in targeted if name not in inside]
    below = [name for name in targeted if inside.get(name, router_index) < router_index]
    if outside:
        problems.append(
            f"target_modules reaches {_some(outside)}: only linears inside the decoder layers can be routed, "
            "not embeddings or the head"
        )
    if below:
        problems.append(
            f"target_modules reaches {_some(below)} below the router, which reads the hidden states entering layer "
            f"{router_index}: layers before it must stay the base's own"
        )
    if not targeted:
        problems.append(f"target_modules {config.target_modules!r} matches nothing in {type(base).__name__}")
    if problems:
        raise ValueError("this LoraConfig cannot make a routed expert: " + "; ".join(problems))
    config.task_type = TaskType.CAUSAL_LM
    config.inference_mode = False
    return config


def _unsupported_fields(config: LoraConfig) -> list[str]:
    problems = []
    if not isinstance(config.r, int) or config.r < 1:
        problems.append(f"r is {config.r!r}; it must be a whole number of at least 1")
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if field.name not in LORA_FIELDS and value != default and value:
            reason = WHY_NOT.get(field.name, "routed experts are plain LoRA")
            problems.append(f"{field.name} is {value!r}: {reason}")
    if config.init_lora_weights not in (True, False, "gaussian"):
        problems.append(
            f"init_lora_weights is {config.init_lora_weights!r}: routed experts start from True, False or "
            "'gaussian', because the others rewrite the base's weights or need a plain LoRA layer"
        )
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
