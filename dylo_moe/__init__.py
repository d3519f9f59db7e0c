"""DyLoRA-MoE: one frozen language model, many LoRA experts, a router that sends each token to the right ones."""

from .checkpoint import CheckpointError
from .config import DataConfig, RouterConfig
from .model import DyLoRAMoE, DyLoRAMoEOutput
from .router import Routing

__version__ = "0.1.0"

__all__ = ["CheckpointError", "DataConfig", "DyLoRAMoE", "DyLoRAMoEOutput", "RouterConfig", "Routing", "__version__"]
