"""Laws of checkpoints that were altered, by accident or on purpose: refused in one line, never a traceback.

An accident is found by checksums. Whoever alters something on purpose computes them anew, so that what is in the files
is checked as well, field by field.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.altered import places, put, rehash
from reference.checkpoints import grown, load
from reference.tiny import tiny_base
from transformers import TrainerState

from dylo_moe import CheckpointError
from dylo_moe.cli import main
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.model.saving import save_checkpoint
from dylo_moe.training.saved_state import read_settings, read_trainer_state
from dylo_moe.utils.errors import DyLoRAWarning

RECORD = {
    "settings": {"model": "tiny", "num_train_epochs": 3, "datasets": ["low"]},
    "data": {"0: training rows": "5 rows, abc"},
    "facts": {},
    "step": 3,
    "epoch": 1.5,
    "world_size": 1,
    "losses_before": {"low": 1.5},
    "trainable": {"text": "all", "sha256": "0"},
}

ODD = [None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), -1e308, "", "(", "../../x", "\ud800", "\x1b[31m"]

VALUES = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)

ONE_FOLDER = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("altered") / "checkpoint"
    save_checkpoint(grown(), folder, training=RECORD)
    return folder


@pytest.fixture
def altered(original, tmp_path):
    shutil.copytree(original, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def is_accepted(read, *arguments) -> bool:
    """Whether a reader accepts what it reads; else it must say why, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DyLoRAWarning)
            read(*arguments)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, error
        return False
    return True


# --- accidents


def test_no_flipped_bit_of_a_manifest_is_accepted(original, altered):
    """Reported: 832 of 2,500 were: half-life, alpha, fingerprints, the records of growth and training."""
    content, numbers = (original / "dylora.json").read_bytes(), random.Random(0)
    for _ in range(300):
        flipped = bytearray(content)
        flipped[numbers.randrange(len(flipped))] ^= 1 << numbers.randrange(8)
        (altered / "dylora.json").write_bytes(bytes(flipped))
        assert not is_accepted(read_manifest, altered), flipped


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5_000, "1e999", "", "null", '""', "{}", "\x00", "\ufeff{}"]
)
def test_what_is_no_manifest_is_one_line(altered, text):
    (altered / "dylora.json").write_text(text)
    assert not is_accepted(read_manifest, altered)
    (altered / "trainer_state.json").write_text(text)
    assert not is_accepted(read_trainer_state, altered)


def test_an_older_checkpoint_is_read_and_called_older(original, altered):
    """Written before manifests had a checksum; the rest of it is checked as ever."""
    manifest = json.loads((altered / "dylora.json").read_text())
    del manifest["checksum"]
    (altered / "dylora.json").write_text(json.dumps(manifest))
    with pytest.warns(DyLoRAWarning, match="written by an older version") as said:
        load(altered)
    assert len(said) == 1
    manifest["bhecksum"] = "0" * 64
    (altered / "dylora.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="'bhecksum', which is unknown"):
        read_manifest(altered)


# --- on purpose


@settings(ONE_FOLDER, max_examples=70)
@given(data=st.data(), value=VALUES)
def test_a_manifest_with_any_value_anywhere_is_refused_or_means_the_same(original, tmp_path, data, value):
    manifest = json.loads((original / "dylora.json").read_text())
    place = data.draw(st.sampled_from(places(manifest)))
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        shutil.copytree(original, folder)
    (folder / "dylora.json").write_text(json.dumps(put(manifest, place, value)))
    rehash(folder, files=())
    if is_accepted(read_manifest, folder):
        is_accepted(load, folder)


@pytest.mark.parametrize(
    ("place", "value", "part"),
    [
        (("router", "router_half_life"), "8", "router.router_half_life is '8'; it must be a finite number"),
        (("router", "top_k"), True, "router.top_k is True; it must be a whole number"),
        (("router", "top_k"), 10**30, "must be a whole number"),
        (("balance_coefficient",), -0.5, "balance_coefficient is -0.5; it must be a finite number of at least 0"),
        (("balance_coefficient",), float("nan"), "balance_coefficient is nan"),
        (("experts", 0, "name"), ["a"], r"experts[0].name is ['a']; it must be a text"),
        (("experts", 0, "mature"), 1, "mature is 1; it must be true or false"),
        (("experts", 0, "rank"), 5, "dylora.json says 5"),
        (("experts", 0, "parameters"), 5, "has 5 parameters; it has"),
        (("lora", "lora_alpha"), 0, "lora_alpha is 0; it must be a finite number above 0"),
        (("lora", "lora_dropout"), 1.0, "lora_dropout is 1.0"),
        (("lora", "surprise"), 1, "lora has 'surprise', which is unknown here"),
        (("base", "fingerprint", "tensors"), [], "tensors is []; it must be an object"),
        (("files", "router.safetensors", "bytes"), "x", "bytes is 'x'; it must be a whole number"),
        (("files", "../x"), {"sha256": "0" * 64, "bytes": 0}, "outside of the folder"),
        (("training", "step"), -1, "training: step is -1"),
        (("training", "data"), [1], "training.data is [1]; it must be an object"),
    ],
    ids=str,
)
def test_each_kind_of_field_has_its_type_and_range(original, altered, place, value, part):
    manifest = json.loads((original / "dylora.json").read_text())
    (altered / "dylora.json").write_text(json.dumps(put(manifest, place, value)))
    rehash(altered, files=())
    with pytest.raises(CheckpointError) as caught:
        load(altered)
    assert part in str(caught.value), caught.value


@settings(ONE_FOLDER, max_examples=30)
@given(data=st.data(), value=VALUES)
def test_an_adapter_config_with_any_value_is_refused_or_works(original, tmp_path, data, value):
    folder, name = tmp_path / "checkpoint", "experts/wide/adapter_config.json"
    if not folder.exists():
        shutil.copytree(original, folder)
    config = json.loads((original / name).read_text())
    place = data.draw(st.sampled_from(places(config)))
    (folder / name).write_text(json.dumps(put(config, place, value)))
    rehash(folder, files=(name,))
    is_accepted(load, folder, copy.deepcopy(BASE))


BASE = tiny_base()


@ONE_FOLDER
@given(data=st.data(), value=VALUES)
def test_a_trainer_state_with_any_value_is_refused_or_is_one(tmp_path, data, value):
    state = TrainerState(epoch=1.0, global_step=3, log_history=[{"step": 1, "loss": 2.0}]).__dict__
    state = json.loads(json.dumps(state))
    place = data.draw(st.sampled_from(places(state)))
    (tmp_path / "trainer_state.json").write_text(json.dumps(put(state, place, value)))
    if is_accepted(read_trainer_state, tmp_path):
        assert read_trainer_state(tmp_path).global_step >= 0


@pytest.mark.parametrize("text", ["[" * 5_000, "- 1", "x", "", "a: [", "1: 2", "\x00", "!!python/object:os.system {}"])
def test_the_settings_of_a_run_that_are_none_are_one_line(tmp_path, text, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert not is_accepted(read_settings, tmp_path / "run" / "config.yaml")
    capsys.readouterr()
    assert main(["train", "--resume_from_checkpoint", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
