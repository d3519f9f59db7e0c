"""Alarms about the routing while experts train: an expert without tokens, and an expert that gets them all."""

from __future__ import annotations

from collections.abc import Mapping

from dylo_moe.training.metrics import MeterReading

DEAD_SHARE = 0.01
"""An expert that gets less than this share of the tokens is called dead."""

ALARM_TOKENS = 4096
"""The number of tokens for which an alarm must hold; over fewer, the shares vary by chance."""

COLLAPSED_SHARE = 0.9
"""The router has collapsed where one of several experts gets more than this share of the tokens of several datasets."""


def dead_experts(readings: Mapping[str, MeterReading]) -> list[str]:
    """The experts with less than `DEAD_SHARE` of the tokens of every dataset that has routed tokens."""
    shares = [reading.shares for reading in readings.values() if reading.num_routed > 0]
    return [name for name in (shares or [{}])[0] if all(share[name] < DEAD_SHARE for share in shares)]


def alarms(reading: MeterReading) -> dict[str, str]:
    """The alarms of a stretch of training: sentences with advice, by names that stay the same while an alarm lasts."""
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
    """Reports when each alarm begins and ends; it begins once it has held for `ALARM_TOKENS` tokens."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        """The number of tokens for which each alarm has held."""

    def changes(self, found: dict[str, str], num_tokens: int) -> list[str]:
        """The sentences to report after a stretch of training.

        Args:
            found: the alarms of the stretch.
            num_tokens: its tokens that were routed.
        """
        before = self.held
        self.held = {name: before.get(name, 0) + num_tokens for name in found}
        begun = [found[name] for name, held in self.held.items() if before.get(name, 0) < ALARM_TOKENS <= held]
        over = [f"over: {name}" for name, held in before.items() if held >= ALARM_TOKENS and name not in found]
        return begun + over
