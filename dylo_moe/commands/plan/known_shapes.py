"""The shapes of some published models, so that a run on one of them can be planned without reaching the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from dylo_moe.base.smollm2 import EMBEDDED_BASE, cache_folder
from dylo_moe.utils.hub import first_line, no_way_to_hub

GEMMA_2B: dict[str, Any] = {
    "model_type": "gemma",
    "vocab_size": 256_000,
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}

KNOWN: dict[str, dict[str, Any]] = {
    "google/codegemma-2b": GEMMA_2B,
    "google/gemma-2b": GEMMA_2B,
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "Qwen/Qwen2.5-Coder-1.5B": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "meta-llama/Meta-Llama-3-8B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "Qwen/Qwen2.5-14B": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 5120,
        "intermediate_size": 13_824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2_135M,
}
"""Keyword values of each model's Transformers config: what decides its parameters, and the dtype it is published in."""


def base_config(name: str) -> PretrainedConfig:
    """The config of the base `name`: of a folder, of the small model's own, of a shape known here, or from the hub.

    Nothing of a model but its config is read, and nothing is fetched for a name that is known here.

    Raises:
        ValueError: for a name whose config cannot be had; the message lists the names that need no hub.
    """
    if name == EMBEDDED_BASE:
        folder = cache_folder() / EMBEDDED_BASE
        if not (folder / "config.json").is_file():
            return AutoConfig.for_model(**{**SMOLLM2_135M, "dtype": "float32"})  # as the conversion would store it
    else:
        folder = Path(name)
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    if not folder.exists() and name in KNOWN:
        return AutoConfig.for_model(**KNOWN[name])
    known = f"known without the hub: {EMBEDDED_BASE}, {', '.join(KNOWN)}; or give a folder with a config.json"
    if folder.exists():
        raise ValueError(f"model {name!r} is here, but has no config.json; {known}")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=no_way_to_hub())
    except (OSError, ValueError) as error:
        raise ValueError(f"the config of model {name!r} cannot be had: {first_line(error)}. {known}") from error
