"""DyLoRA-MoE: one frozen language model, many LoRA experts, a router that sends each token to the right ones."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from dylo_moe.utils.other_libraries import drop_useless_lines

if TYPE_CHECKING:
    from dylo_moe.base.loading import load_base, load_tokenizer
    from dylo_moe.continual.config import GrowthConfig
    from dylo_moe.data.collator import Collator
    from dylo_moe.data.config import DataConfig
    from dylo_moe.data.loading import load_data
    from dylo_moe.model.checkpoint import CheckpointError
    from dylo_moe.model.model import DyLoRAMoE
    from dylo_moe.model.output import DyLoRAMoEOutput
    from dylo_moe.routing.config import RouterConfig
    from dylo_moe.routing.router import Routing

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # what the package says is printed only where asked for
drop_useless_lines()

_HOMES = {
    "CheckpointError": "dylo_moe.model.checkpoint",
    "Collator": "dylo_moe.data.collator",
    "DataConfig": "dylo_moe.data.config",
    "DyLoRAMoE": "dylo_moe.model.model",
    "DyLoRAMoEOutput": "dylo_moe.model.output",
    "GrowthConfig": "dylo_moe.continual.config",
    "RouterConfig": "dylo_moe.routing.config",
    "Routing": "dylo_moe.routing.router",
    "load_base": "dylo_moe.base.loading",
    "load_data": "dylo_moe.data.loading",
    "load_tokenizer": "dylo_moe.base.loading",
}
"""The module of each public name. It is imported when the name is first used: torch, Transformers and PEFT take
seconds, and `dylora --help` needs none of them."""

__all__ = [
    "CheckpointError",
    "Collator",
    "DataConfig",
    "DyLoRAMoE",
    "DyLoRAMoEOutput",
    "GrowthConfig",
    "RouterConfig",
    "Routing",
    "__version__",
    "load_base",
    "load_data",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
