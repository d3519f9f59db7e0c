"""One random state for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_state():
    torch.manual_seed(0)
