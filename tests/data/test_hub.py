"""The way through the hub, with the real client, against a stand-in of the hub's interface on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reference.hub import serving
from reference.mirrors import write_mirror
from reference.paths import ROOT, TESTS

from dylo_moe.data.sources.catalog import CATALOG

NAMES = [name for name, source in CATALOG.items() if source.hub_id and source.for_training]
LOAD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from reference.texts import CHAT
from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
try:
    data = load_data(DataConfig(max_seq_length=400, **json.loads(sys.argv[2])), CHAT)
except ValueError as error:
    print(json.dumps({"error": str(error)}))
else:
    counts = [count[:-1] for count in data.counts]
    print(json.dumps({"counts": counts, "origins": data.origins, "train": data.train[:]}))
"""


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def load(home: Path, *, endpoint: str = "http://127.0.0.1:9", offline: bool = False, **config) -> dict:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(TESTS), json.dumps(config)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_hub_s_rows_are_those_of_the_mirror_and_stay_when_the_hub_is_gone(mirror, home):
    folders = {CATALOG[name].hub_id: mirror / name for name in CATALOG if CATALOG[name].hub_id}
    commits = {CATALOG[name].hub_id: CATALOG[name].revision for name in CATALOG if CATALOG[name].hub_id}
    with serving(folders, commits) as endpoint:
        from_hub = load(home, endpoint=endpoint, datasets=NAMES)
        strange = load(home, endpoint=endpoint, datasets=["someone/else"])
        moved = load(home, endpoint=endpoint, datasets=["code_alpaca@" + "0" * 40])
    from_mirror = load(home, datasets=NAMES, data_dir=str(mirror))
    later = load(home, offline=True, datasets=NAMES)
    assert not [found["error"] for found in (from_hub, from_mirror, later) if "error" in found]
    assert from_hub["train"] == from_mirror["train"] == later["train"]
    assert from_hub["counts"] == from_mirror["counts"] == later["counts"]
    assert all(origin.startswith("hub ") for origin in from_hub["origins"].values())
    assert "(1) reach the hub (someone/else;" in strange["error"] and "\n" not in strange["error"]
    # `datasets` would have taken the commit that it has, and said so in a log message.
    assert f"asked for at commit {'0' * 40}, which the hub did not give; the cache has" in moved["error"]


def test_a_hub_that_does_not_answer_is_told_from_one_that_has_no_such_dataset(home):
    failed = load(home, offline=True, datasets=["nobody/nothing"])
    assert "the dataset 'nothing' cannot be read" in failed["error"] and "(2) put its files into" in failed["error"]
