"""The two-phase rate, step by step."""

import pytest
import torch

from dylo_moe.training.scheduler import TwoPhaseLR


def rates(steps, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, found = TwoPhaseLR(optimizer, **options), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_high_until_the_switch_then_low():
    assert rates(5, low_ratio=0.25, switch_step=3) == [2.0, 2.0, 2.0, 0.5, 0.5]


def test_warm_up_is_of_the_first_phase():
    assert rates(6, low_ratio=0.5, switch_step=4, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 1.0, 1.0]


def test_without_seeding_all_is_low():
    assert rates(4, low_ratio=0.5, switch_step=0, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


def test_it_goes_on_where_it_was():
    options = {"low_ratio": 0.1, "switch_step": 3, "warmup_steps": 2}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = TwoPhaseLR(optimizer, **options)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    saved = scheduler.state_dict()
    again = TwoPhaseLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0), **options)
    again.load_state_dict(saved)
    found = []
    for _ in range(3):
        again.optimizer.step()
        again.step()
        found.append(again.get_last_lr()[0])
    assert found == rates(6, **options)[3:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_ratio": 0.0, "switch_step": 1}, "low_ratio is 0"),
        ({"low_ratio": 1.5, "switch_step": 1}, "low_ratio is 1.5"),
        ({"low_ratio": 0.5, "switch_step": -1}, "switch_step is -1"),
        ({"low_ratio": 0.5, "switch_step": 1, "warmup_steps": -2}, "warmup_steps is -2"),
    ],
)
def test_it_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        rates(1, **options)
