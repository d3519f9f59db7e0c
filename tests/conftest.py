"""One random state for every test, and a checkpoint that is made once."""

import copy
import shutil

import pytest
import torch
from reference.checkpoints import grown


@pytest.fixture(autouse=True)
def _same_random_state():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    model, folder = grown(), tmp_path_factory.mktemp("original") / "saved"
    model.save_pretrained(str(folder))
    return model, folder


@pytest.fixture
def saved(original, tmp_path):
    """A model and its checkpoint, the test's own."""
    model, folder = original
    shutil.copytree(folder, tmp_path / "saved")
    return copy.deepcopy(model), tmp_path / "saved"
