"""The config of a base: of a folder, from the hub's cache, among those that come with this package, or from the hub.

`configs/` holds, for some published models, the fields of their own config.json that say what the model is made of.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, PretrainedConfig

from dylo_moe.base.loading import load_config
from dylo_moe.base.packaged_models import BaseUnavailableError, is_here
from dylo_moe.base.packages import EMBEDDED_BASE, GEMMA

CONFIGS = Path(__file__).parent / "configs"

PACKAGED_CONFIGS = {EMBEDDED_BASE: "HuggingFaceTB/SmolLM2-135M", GEMMA: "google/gemma-3-270m"}
"""The published model that each packaged one is."""


def known_names() -> list[str]:
    """The hub ids of the models whose config comes with this package."""
    return sorted((path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")), key=str.lower)


def known_config(name: str) -> Path:
    """The file that holds the config of a model, if it comes with this package."""
    return CONFIGS / f"{name.replace('/', '--')}.json"


def base_config(name: str) -> PretrainedConfig:
    """The config of the base `name`. Nothing else of a model is read, and nothing is fetched for a name that is known.

    Raises:
        BaseUnavailableError: for a name whose config cannot be had; the message lists the names that need no hub.
    """
    if name in PACKAGED_CONFIGS and not is_here(name):
        return AutoConfig.from_pretrained(known_config(PACKAGED_CONFIGS[name]), dtype="float32")  # as it will be stored
    if not Path(name).exists() and known_config(name).is_file() and not _is_in_cache(name):
        return AutoConfig.from_pretrained(known_config(name))
    try:
        return load_config(name)
    except BaseUnavailableError as error:
        raise BaseUnavailableError(f"{error} Known without the hub: {', '.join(known_names())}.") from error


def _is_in_cache(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False
