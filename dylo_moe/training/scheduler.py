"""Two-phase learning rate: a new expert is seeded at a high rate, then consolidated at a low one."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class TwoPhaseLR(LambdaLR):
    """Trains at each parameter group's own rate while an expert is seeded, and at a fraction of it from then on.

        rate(t) = high * min(1, (t + 1) / warmup)                   for t < switch
        rate(t) = high * low_ratio                                  for t >= switch

    With switch = 0 all is consolidation, after the same warm-up: rate(t) = high * low_ratio * min(1, (t + 1) / warmup).

    Args:
        optimizer: its groups' learning rates are the high rates.
        low_ratio: the low rate over the high one, above 0 and at most 1.
        switch_step: the first step of consolidation.
        warmup_steps: steps over which the rate rises to its first level.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(self, optimizer: Optimizer, *, low_ratio: float, switch_step: int, warmup_steps: int = 0) -> None:
        if not 0 < low_ratio <= 1:
            raise ValueError(f"low_ratio is {low_ratio:g}; it must be above 0 and at most 1")
        for name, value in (("switch_step", switch_step), ("warmup_steps", warmup_steps)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")

        self.switch_step = switch_step
        """The first step of consolidation; a part of the scheduler's state."""

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
            if self.switch_step == 0:
                return low_ratio * warm
            return warm if step < self.switch_step else low_ratio

        super().__init__(optimizer, factor)

    def switch_now(self) -> None:
        """Begin consolidation with the next step."""
        self.switch_step = self.last_epoch
        rates = [high * factor(self.last_epoch) for high, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates
