"""One random state for every test, a checkpoint that is made once, and the table of the laws."""

import copy
import shutil

import datasets
import pytest
import torch
from reference.checkpoints import grown
from reference.laws import KEY, Comparison, Laws, table
from reference.runs import tiny_run_folder


def pytest_addoption(parser):
    parser.addoption("--laws", action="store_true", help="print each law with the largest difference that was seen")


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--laws"):
        reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
        values = [value for report in reports for name, value in report.user_properties if name == KEY]
        terminalreporter.write_line("")
        terminalreporter.write_line(table([Comparison(*value) for value in values]))


@pytest.fixture
def laws(record_property):
    """Compares, and writes the difference down."""
    return Laws(record_property)


@pytest.fixture(autouse=True)
def _same_random_state():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_data_cache(tmp_path_factory):
    """Tokenised rows go to a folder of the test run's own, and no progress bars into its output."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A base with its tokenizer in a folder, and two small datasets of different words; no test may change it."""
    return tiny_run_folder(tmp_path_factory.mktemp("tiny"), words=30)
