"""Whether a loaded base is still what its own files hold."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dylo_moe.base.fingerprint import base_identity, differences, fingerprint_of, some_of
from dylo_moe.utils.errors import DyLoRAWarning


def warn_of_changes(base: PreTrainedModel) -> None:
    """Warn where a base was changed after it was loaded (resized, merged into, trained), for no checkpoint holds it."""
    changed = changes_since_loading(base)
    if changed:
        warnings.warn(
            f"the base is no longer what {base.name_or_path} loads: {some_of(changed)}. No checkpoint holds the base, "
            "and none could be loaded onto that one. Save this base (base.save_pretrained), load it from there, and "
            "make the model on that",
            DyLoRAWarning,
            stacklevel=3,
        )


def changes_since_loading(base: PreTrainedModel) -> list[str]:
    """The differences between a base and its files, as far as these are on this machine as safetensors, and hold
    tensors of the same names; of each tensor one row is read.

    Quantised weights are not compared.
    """
    if getattr(base, "hf_quantizer", None) is not None:
        return []
    own = {name: parameter for name, parameter in base.named_parameters() if not parameter.is_meta}
    here: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    shapes = []
    try:
        for file in _weight_files(base):
            with safe_open(file, "pt") as opened:
                for name in sorted(own.keys() & set(opened.keys())):
                    part = opened.get_slice(name)
                    was, shape = part.get_shape(), list(own[name].shape)
                    if was != shape:
                        shapes.append(f"{name} has shape {shape}, was {was}")
                    elif shape and own[name].is_floating_point():
                        row = shape[0] // 2
                        stored[name], here[name] = part[row : row + 1], own[name][row : row + 1].detach()
    except (OSError, ValueError, SafetensorError):  # files of another kind, or being written
        return []
    return shapes + (differences(fingerprint_of(stored), fingerprint_of(here)) if stored else [])


def _weight_files(base: PreTrainedModel) -> list[str]:
    """The files that hold a base's weights, where they are on this machine."""
    name, revision = base_identity(base)
    if not name:
        return []
    if index := _file(name, SAFE_WEIGHTS_INDEX_NAME, revision):
        parts = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        parts = [SAFE_WEIGHTS_NAME]
    found = [_file(name, part, revision) for part in parts]
    return [path for path in found if path is not None]


def _file(name: str, part: str, revision: str | None) -> str | None:
    if Path(name).is_dir():
        path = Path(name, part)
        return str(path) if path.is_file() else None
    try:
        found = try_to_load_from_cache(name, part, revision=revision)
    except HFValidationError:  # no hub id
        return None
    return found if isinstance(found, str) else None
