"""The base's config as trainers see it: they read from a model's config what to do with its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig


class ConfigView:
    """The base's config, and three answers of our own; attributes that are set are set on the base's.

    Args:
        config: of the base.
        not_predictions: the outputs that the Trainer must not gather as predictions.
    """

    output_router_logits = False
    """An attribute that makes TRL add `aux_loss` to the loss. TRL sets it, and no code of ours reads it."""
    router_aux_loss_coef = 1.0
    """The factor of `aux_loss` in TRL's loss; `aux_loss` already contains our coefficients."""

    def __init__(self, config: PreTrainedConfig, *, not_predictions: Sequence[str]) -> None:
        object.__setattr__(self, "_config", config)
        keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        object.__setattr__(self, "keys_to_ignore_at_inference", [*keys, *not_predictions])

    def get_text_config(self, *args: Any, **kwargs: Any) -> ConfigView:
        """The base's text config, in the same view."""
        return ConfigView(
            self._config.get_text_config(*args, **kwargs), not_predictions=self.keys_to_ignore_at_inference
        )

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or name.startswith("__"):  # while it is being copied
            raise AttributeError(name)
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(ConfigView, name):
            setattr(self._config, name, value)
