"""When the Trainer saves."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class SavePoints(TrainerCallback):
    """When to save: after the evaluation where an epoch or the training ends, and with the losses logged."""

    def __init__(self) -> None:
        self.is_put_off = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put off to the end of the epoch, or log."""
        if control.should_save and (float(state.epoch).is_integer() or control.should_training_stop):
            self.is_put_off, control.should_save = True, False
        control.should_log |= control.should_save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was put off."""
        control.should_save |= self.is_put_off
        control.should_log |= control.should_save
        self.is_put_off = False
