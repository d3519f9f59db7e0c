"""The pool: add, freeze, mature and remove experts. Each is one ordinary PEFT LoRA adapter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.utils import get_peft_model_state_dict
from torch import nn

from dylo_moe.experts.adapter import config_at, state_problems
from dylo_moe.experts.layer import RoutedLayer, compute_dtype, routed_class
from dylo_moe.experts.memory_layout import pack
from dylo_moe.experts.targets import ROUTABLE
from dylo_moe.routing.config import BASE, SHARED
from dylo_moe.routing.dispatch import ExpertShape, Layout
from dylo_moe.routing.forward_context import ContextSlot
from dylo_moe.utils.errors import DyLoRAWarning
from dylo_moe.utils.other_libraries import without_peft_active_adapter
from dylo_moe.utils.words import listed

NAME_RULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

RESERVED_NAMES = {BASE, SHARED, "default", "base_model", "lora_A", "lora_B"}

TAKEN_BY_TORCH = frozenset([*dir(nn.ModuleDict()), *dir(nn.ParameterDict()), "weight", "bias"])


@dataclass
class Expert:
    """One expert of the pool, as `model.experts` shows it."""

    name: str
    rank: int
    mature: bool
    """False while it is nascent: one nascent expert makes routing dense."""
    trainable: bool
    """Whether its adapter receives gradients, and where the pool does not grow its gate row too."""
    parameters: int
    """Number of its adapter's parameters."""
    skill: str | None = None
    """The kind of data it was grown for, when it was."""


class ExpertPool:
    """All experts of a model, in gate order, on one PeftModel.

    A shared expert, which every token uses, is beside them: it has no place in the order and no gate row, so that
    iteration, length and names leave it out.

    Args:
        model: the PeftModel whose adapters are the experts.
        slot: what its routed linears share.
        lora: the first expert's config; `add` derives the others from it.
    """

    def __init__(self, model: PeftModel, slot: ContextSlot, lora: LoraConfig) -> None:
        self._model = model
        self._slot = slot
        self.lora = lora
        """The config of the next expert."""
        self._experts: dict[str, Expert] = {}
        self.shared: Expert | None = None
        """The expert that every token uses; None: there is none."""
        self.layers: tuple[RoutedLayer, ...] = ()
        """The routed linears, in the model's order."""
        self.layouts: tuple[Layout, ...] = ()
        """The names of the routed linears."""

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

    def find(self, name: str) -> Expert:
        """An expert by name, the shared one among them. Raises ValueError for an unknown name."""
        return self.shared if name == SHARED and self.shared is not None else self[name]

    @property
    def everyone(self) -> tuple[Expert, ...]:
        """The experts in gate order, and the shared one, if any, after them."""
        return (*self, *([] if self.shared is None else [self.shared]))

    def __contains__(self, name: object) -> bool:
        return name in self._experts

    def __repr__(self) -> str:
        return f"ExpertPool({list(self._experts.values())!r})"

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in gate order."""
        return tuple(self._experts)

    @property
    def has_nascent(self) -> bool:
        """Whether some expert is still learning, which makes routing dense."""
        return any(not expert.mature for expert in self)

    def config_for(self, rank: int | None, *, like: str | None = None) -> LoraConfig:
        """The LoRA config of a new expert at a rank; alpha follows, so that the scaling stays.

        Args:
            rank: default that of the config it is made of.
            like: the expert whose config it is made of; default the pool's own.
        """
        config = self.lora if like is None else cast(LoraConfig, self._model.peft_config[like])
        return config_at(config, rank, whose="pool" if like is None else f"expert {like}")

    def register(self, name: str, *, mature: bool, skill: str | None = None) -> Expert:
        """Take an adapter that the PeftModel already has into the pool, as its last expert."""
        rank = cast(LoraConfig, self._model.peft_config[name]).r
        self._experts[name] = Expert(name, rank, mature, True, 0, skill)
        self.refresh([name])
        self._experts[name].parameters = sum(parameter.numel() for parameter in self.parameters(name))
        return self._experts[name]

    def add(self, name: str, config: LoraConfig, *, mature: bool, skill: str | None = None) -> Expert:
        """Inject a fresh adapter and take it into the pool, as its last expert.

        It has no memory before `pack`, so that adding many at once allocates each layer's block once. PEFT injects
        layer by layer, so that callers undo what it has begun where it raises.
        """
        check_name(name, taken=self._experts, modules=self.base_modules())
        with self.set_aside():
            PeftModel.add_adapter(self._model, name, config, low_cpu_mem_usage=True)
            if not self._experts:
                PeftModel.set_adapter(self._model, name)
                for placeholder in [other for other in self._model.peft_config if other != name]:
                    del self._model.peft_config[placeholder]
        return self.register(name, mature=mature, skill=skill)

    def add_shared(self, config: LoraConfig) -> Expert:
        """Inject the adapter of the shared expert, which has no memory before `pack`.

        Raises:
            ValueError: for a base with modules of that name, from which PEFT cannot tell an adapter.
        """
        if any(SHARED in path.split(".") for path in self.base_modules()):
            raise ValueError(f"the base has modules named {SHARED!r}, so that it cannot have a shared expert")
        with self.set_aside():
            PeftModel.add_adapter(self._model, SHARED, config, low_cpu_mem_usage=True)
        self.shared = Expert(SHARED, config.r, True, True, 0)
        self.refresh([SHARED])
        self.shared.parameters = sum(parameter.numel() for parameter in self.parameters(SHARED))
        return self.shared

    def load(
        self, name: str, config: LoraConfig, state: dict[str, torch.Tensor], *, path: str, skill: str | None
    ) -> Expert:
        """Take a trained adapter into the pool, as its last expert, nascent; packed, in the others' dtype.

        Args:
            config: checked already.
            state: its tensors, as PEFT names them in files.
            path: where it came from.

        Raises:
            ValueError: naming every tensor that is missing, foreign, misshapen or not finite; callers undo the rest.
        """
        dtype = next(self.parameters(self.names[0])).dtype
        if config.lora_dropout != self.lora.lora_dropout:
            warnings.warn(
                f"adapter {path} was trained with lora_dropout {config.lora_dropout}; here it has the pool's, "
                f"{self.lora.lora_dropout}",
                DyLoRAWarning,
                stacklevel=3,
            )
            config.lora_dropout = self.lora.lora_dropout
        try:
            expert = self.add(name, config, mature=False, skill=skill)
        except Exception as error:  # values that only PEFT knows to be wrong
            raise ValueError(f"adapter {path} cannot be an expert: {type(error).__name__}: {error}") from error
        self.pack()
        problems = state_problems(self.state(name), state)
        if problems:
            raise ValueError(f"adapter {path} does not fit: " + "; ".join(problems[:5]))
        self.fill(name, state)
        self.cast(name, dtype)
        self.pack()
        return expert

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """An expert's matrices under the names that PEFT gives them in its files."""
        # The adapters alone, because the base's state may be sharded over several ranks.
        own = {key: value.detach() for key, value in self._model.named_parameters() if ".lora_" in key}
        return get_peft_model_state_dict(self._model, state_dict=own, adapter_name=name, save_embedding_layers=False)

    @torch.no_grad()
    def fill(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """Put values into an expert's matrices, which are all there under the names that `state` has.

        Not through PEFT's loader: it renames keys as Transformers does those of old checkpoints of the base, and what
        it then finds nowhere it leaves out in silence.
        """
        own = self.state(name)
        for key, value in state.items():
            own[key].copy_(value)

    def copy(self, source: str, target: str) -> None:
        """Give an expert the values of another; of different ranks, the leading components of the smaller."""
        for layer in self.layers:
            if source in layer.adapters and target in layer.adapters:
                ours, theirs = layer.adapters[target], layer.adapters[source]
                rank = min(ours.shape.rank, theirs.shape.rank)
                cast(nn.Parameter, ours.down.weight)[:rank].copy_(theirs.down.weight[:rank])
                cast(nn.Parameter, ours.up.weight)[:, :rank].copy_(theirs.up.weight[:, :rank])

    def base_modules(self) -> list[str]:
        """The module names of the base, adapted linears among them."""
        with self.set_aside():
            names = [path for path, _ in cast(nn.Module, self._model.base_model.model).named_modules()]
        return [path for path in names if ".lora_" not in path]

    def named_layers(self) -> list[tuple[str, RoutedLayer]]:
        """The routed linears with their module names in the base, in the model's order."""
        with self.set_aside():
            found = [path for path, _ in routed_layers(self._model)]
        return [(path.removeprefix("base_model.model."), layer) for path, layer in zip(found, self.layers, strict=True)]

    def set_aside(self) -> AbstractContextManager[None]:
        """Hide the adapters of all routed linears while the context lasts; see `adapters_set_aside`."""
        return adapters_set_aside(self.layers)

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
        with without_peft_active_adapter():
            PeftModel.delete_adapter(self._model, name)
        self.refresh()
        self.pack()

    def empty(self, placeholder: str) -> None:
        """Delete the adapter that PEFT adapted the linears with; its config stays until the first expert comes."""
        PeftModel.delete_adapter(self._model, placeholder)
        self._model.peft_config[placeholder] = self.lora
        self.refresh()

    def refresh(self, changed: Sequence[str] | None = None) -> None:
        """Restore routed classes, shapes and trainability after the adapters changed; `pack` then restores the storage.

        Args:
            changed: as of `apply_trainable`.

        Raises:
            ValueError: naming the layers that cannot be routed.
        """
        with self.set_aside():
            found = list(routed_layers(self._model))
        classes = [routed_class(type(layer)) for _, layer in found]
        refused = [
            f"{name} ({type(layer).__name__})" for (name, layer), kind in zip(found, classes, strict=True) if not kind
        ]
        if refused:
            raise ValueError(f"PEFT's layers {listed(refused)} cannot be routed; {ROUTABLE}")
        layers = [layer for _, layer in found]
        # PEFT makes the layer that suits the base's linear, of which it knows more kinds than we do, and only its class
        # is exchanged. Its hook for other classes (`_register_custom_module`) is private and experimental, and would
        # build the layers from our code instead. tests/experts/test_peft_private.py holds what this relies on.
        for layer, kind in zip(layers, classes, strict=True):
            layer.__class__ = kind
            layer.bind(self._slot, self._experts, shared=None if self.shared is None else SHARED)
        self.layers = tuple(layers)
        layouts: dict[tuple[tuple[ExpertShape, ...], ExpertShape | None], Layout] = {}
        for layer in layers:
            layer.layout = layouts.setdefault((layer.layout.shapes, layer.layout.shared), layer.layout)
        self.layouts = tuple(layouts.values())
        self.apply_trainable(changed)

    def compute_dtype(self) -> torch.dtype:
        """What the adapters are computed in at this moment: their dtype, or autocast's."""
        first = next((parameter for name in self.names for parameter in self.parameters(name)), None)
        return torch.float32 if first is None else compute_dtype(first)

    def apply_trainable(self, changed: Sequence[str] | None = None) -> None:
        """PEFT resets `requires_grad` in many of its methods; this puts our policy back.

        Args:
            changed: the experts whose adapters it may have reset, or whose `trainable` is another; None: all.
        """
        with self.set_aside():
            for parameter in self._model.base_model.parameters():
                parameter.requires_grad_(False)
        for name in [expert.name for expert in self.everyone] if changed is None else changed:
            for parameter in self.parameters(name):
                parameter.requires_grad_(self.find(name).trainable)

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The A and B matrices of one expert, layer by layer."""
        for layer in self.layers:
            if name in layer.adapters:
                yield cast(nn.Parameter, layer.adapters[name].down.weight)
                yield cast(nn.Parameter, layer.adapters[name].up.weight)

    def learning(self) -> Iterator[nn.Parameter]:
        """The matrices of the experts that are trained; a walk that does not grow with the frozen ones."""
        for expert in self.everyone:
            if expert.trainable:
                yield from self.parameters(expert.name)

    def non_finite(self) -> Iterator[tuple[str, str]]:
        """The experts with NaN or infinity in some matrix, each with the name of the first such parameter."""
        adapters = [(name, p) for name, p in self._model.named_parameters() if ".lora_" in name]
        for expert in self.everyone:
            mark = f".{expert.name}."
            broken = (name for name, p in adapters if mark in name and not p.isfinite().all())
            first = next(broken, None)
            if first is not None:
                yield expert.name, first.replace(mark, ".").removeprefix("base_model.model.")

    def pack(self) -> None:
        """Make each layer's experts contiguous in memory, after some were added, removed or moved."""
        for layer in self.layers:
            for name in pack(layer):
                config = cast(LoraConfig, self._model.peft_config[name])
                cast(Any, layer).reset_lora_parameters(name, config.init_lora_weights)


@contextmanager
def adapters_set_aside(layers: Iterable[Any]) -> Iterator[None]:
    """Hide the adapters of these LoRA layers while the context lasts: PEFT walks over every module and every parameter
    of a model to add one, and that must not take longer the more there are. What is added inside comes behind them."""
    homes = [getattr(layer, home)._modules for layer in layers for home in ("lora_A", "lora_B", "lora_dropout")]
    hidden = [dict(modules) for modules in homes]
    for modules in homes:
        modules.clear()
    try:
        yield
    finally:
        for modules, before in zip(homes, hidden, strict=True):
            added = dict(modules)
            modules.clear()
            modules.update({**before, **added})


def routed_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted linears of a model, with their module names."""
    for name, module in model.named_modules():
        if isinstance(module, (RoutedLayer, lora.LoraLayer)):
            yield name, module


def check_name(name: object, *, taken: Any = (), modules: Iterable[str] = ()) -> None:
    """Raise ValueError unless `name` can be an expert: a folder, a module and a part of state-dict keys.

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
