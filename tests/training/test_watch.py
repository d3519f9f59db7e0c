"""What is watched while experts train, against its definition."""

from __future__ import annotations

import pytest
import torch
from reference.tiny import scramble, tiny_moe, tokens

from dylo_moe.training.alarms import AlarmBell, alarms
from dylo_moe.training.metrics import MeterReading, gate_drift, gradient_norms, load_imbalance


def reading(*shares: float, domains: int = 2) -> MeterReading:
    named = {f"expert_{index}": share for index, share in enumerate(shares)}
    return MeterReading(
        loss=1.0,
        domain_losses={},
        shares=named,
        domain_shares={f"domain_{index}": named for index in range(domains)},
        num_tokens=3000,
        token_entropy=0.0,
        average_entropy=0.0,
        num_routed=3000,
    )


@pytest.mark.parametrize(
    ("shares", "imbalance"), [((0.25, 0.25, 0.25, 0.25), 1.0), ((1.0, 0.0, 0.0, 0.0), 4.0), ((0.5, 0.3, 0.2), 1.5)]
)
def test_imbalance_is_the_busiest_over_the_mean(shares, imbalance):
    assert load_imbalance(reading(*shares).shares) == pytest.approx(imbalance)


def test_alarms_name_the_expert_and_what_to_do():
    assert alarms(reading(0.5, 0.5)) == {}
    assert alarms(reading(1.0)) == {}  # one expert has nobody to share with
    dead = alarms(reading(0.5, 0.495, 0.005))
    assert list(dead) == ["dead expert_2"] and "--balance_coefficient" in dead["dead expert_2"]
    collapsed = alarms(reading(0.95, 0.05))
    assert list(collapsed) == ["collapse"] and "95.0% of the tokens go to expert_0" in collapsed["collapse"]
    assert alarms(reading(0.95, 0.05, domains=1)) == {}  # one kind of data may well be one expert's


def test_an_alarm_is_told_once_when_it_lasts_and_once_when_it_is_over():
    bell, wrong = AlarmBell(), alarms(reading(0.95, 0.05))
    told = [bell.changes(found, 3000) for found in (wrong, wrong, wrong, {}, {}, wrong, {})]
    assert told == [[], [wrong["collapse"]], [], ["over: collapse"], [], [], []]


def test_gradient_norms_are_of_each_experts_own_parameters():
    model, ids = scramble(tiny_moe("llama")), tokens(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    norms = gradient_norms(model, scale=4.0)
    for expert in model.experts:
        grads = [p.grad.flatten() for n, p in model.named_parameters() if f".{expert.name}.weight" in n]
        assert float(norms[expert.name]) == pytest.approx(float(torch.cat(grads).norm()) / 4, rel=1e-5)
    rows = [p.grad.flatten() for n, p in model.named_parameters() if n.startswith("router.")]
    assert float(norms["router"]) == pytest.approx(float(torch.cat(rows).norm()) / 4, rel=1e-5)


def test_gate_drift_is_the_way_in_parts_of_the_start():
    start = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0]), "gone": torch.ones(2)}
    now = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 2.0])}
    assert gate_drift(start, now) == {"a": 0.0, "b": 2.0}
