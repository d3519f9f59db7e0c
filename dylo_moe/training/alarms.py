"""What to watch while experts train: utilisation, gradients, the gate's way, and what looks wrong."""

from __future__ import annotations

from collections.abc import Mapping

from dylo_moe.training.metrics import MeterReading

DEAD_SHARE = 0.01
"""An expert that gets less than this share of the tokens is called dead."""

ALARM_TOKENS = 4096
"""What holds for fewer tokens is chance."""

COLLAPSED_SHARE = 0.9
"""One of several experts that gets more than this share of the tokens, on several kinds of data, has taken over."""


def dead_experts(readings: Mapping[str, MeterReading]) -> list[str]:
    """The experts with less than `DEAD_SHARE` of the tokens of every dataset."""
    experts = next(iter(readings.values())).shares
    return [name for name in experts if all(reading.shares[name] < DEAD_SHARE for reading in readings.values())]


def alarms(reading: MeterReading) -> dict[str, str]:
    """What looks wrong in a stretch of training, with advice; by a name that stays the same while it lasts."""
    if len(reading.shares) == 1:
        return {}
    found = {
        f"dead {name}": f"expert {name} is dead: {share:.1%} of the tokens. Raise --balance_coefficient, or use fewer "
        "experts"
        for name, share in reading.shares.items()
        if share < DEAD_SHARE
    }
    busiest = max(reading.shares, key=lambda name: reading.shares[name])
    if len(reading.domain_shares) > 1 and reading.shares[busiest] > COLLAPSED_SHARE:
        found["collapse"] = (
            f"the router has collapsed: {reading.shares[busiest]:.1%} of the tokens go to {busiest}. Raise "
            "--balance_coefficient, lower --learning_rate, or begin with text of every kind in the first rows"
        )
    return found


class AlarmBell:
    """Tells each alarm when it begins and when it is over; it begins once it has held for `ALARM_TOKENS` tokens."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        """Tokens since each alarm has held."""

    def changes(self, found: dict[str, str], num_tokens: int) -> list[str]:
        """What to tell, given what looks wrong in the newest stretch and how long that was."""
        before = self.held
        self.held = {name: before.get(name, 0) + num_tokens for name in found}
        begun = [found[name] for name, held in self.held.items() if before.get(name, 0) < ALARM_TOKENS <= held]
        over = [f"over: {name}" for name, held in before.items() if held >= ALARM_TOKENS and name not in found]
        return begun + over
