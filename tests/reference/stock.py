"""Adapters as stock PEFT makes and saves them, and the stock model that reads them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from .tiny import tiny_base

STOCK_LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}


def save_stock(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    base: dict[str, Any] | None = None,
    safe: bool = True,
    **lora: Any,
) -> Path:
    """A stock adapter of a tiny base with a random B, saved by PEFT itself."""
    model = get_peft_model(tiny_base(family, **(base or {})), LoraConfig(**{**STOCK_LORA, **lora}))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.to(dtype).save_pretrained(str(folder), safe_serialization=safe)
    return folder


def load_stock(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The base with that adapter, as stock PEFT reads it, all in one dtype, in eval mode."""
    return PeftModel.from_pretrained(tiny_base(family), str(folder)).to(dtype).eval()
