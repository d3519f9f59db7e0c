"""Laws of saving over an older checkpoint: whatever moment a process is killed at, one of the two is there, whole."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import warnings

import pytest
from reference.checkpoints import contents, load
from reference.tiny import tiny_base, tiny_moe

from dylo_moe import CheckpointError
from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.utils import whole_folders
from dylo_moe.utils.errors import DyLoRAWarning

OLD, NEW = ("expert_0", "expert_1"), ("expert_0",)

WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.chmod"}
"""The audit events of Python's calls that change a folder; a child is killed just before one of them."""


@pytest.fixture
def base():
    return tiny_base(num_hidden_layers=1)


def in_a_child(work, *, die_before: int = 0) -> int | None:
    """Let a forked process work, which kills itself just before its n-th change; None: it was killed.

    Returns:
        The number of its changes, at most 255, where it was not killed.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event, args):
            nonlocal count
            if event in WATCHED:
                count += 1
                if count == die_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            work()
            os._exit(count)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) > 0, "it failed"
    return os.WEXITSTATUS(status)


@pytest.mark.parametrize("way", ["exchanged", "renamed twice", "beside other files"])
def test_a_save_that_is_killed_anywhere_leaves_one_of_the_two(base, tmp_path, monkeypatch, way):
    """Reported: of 22 kills one came between two renames, and left nothing at the checkpoint's path."""
    model, old, folder = tiny_moe(base, num_experts=2), tmp_path / "old", tmp_path / "runs" / "saved"
    model.save_pretrained(str(old))
    model.remove_expert("expert_1")
    more = {"state_dict": None} if way == "beside other files" else {}
    if way == "renamed twice":
        monkeypatch.setattr(whole_folders, "exchange", lambda one, other: False)

    def save():
        model.save_pretrained(str(folder), **more)

    def begin():
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(old, folder)
        if more:
            (folder / "trainer_state.json").write_text("{}")

    begin()
    changes = in_a_child(save)
    found = set()
    for moment in range(1, changes + 1):
        if (moment < changes - 22 and moment % 20) or (way == "exchanged" and moment % 4):
            continue  # one more file lies aside, which changes nothing
        begin()
        assert in_a_child(save, die_before=moment) is None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DyLoRAWarning)
            names = read_names(folder)
        assert names in (OLD, NEW), moment
        found.add(names)
        if moment % 3 == 0:
            save()
            assert read_names(folder) == NEW
            assert not [path for path in (*folder.parent.iterdir(), *folder.iterdir()) if path.name[0] == "."], moment
    assert found == {OLD, NEW}


def read_names(folder):
    return tuple(entry["name"] for entry in read_manifest(folder)["experts"])


def test_what_was_moved_aside_is_read_and_put_back(base, tmp_path):
    """The law above for the weights too, and with the warning."""
    model = tiny_moe(tiny_base(num_hidden_layers=1), num_experts=2)
    model.save_pretrained(str(tmp_path / "saved"))
    before = contents(tmp_path / "saved")
    hidden = tmp_path / ".saved.abcdefgh"
    (hidden / "new").mkdir(parents=True)
    (hidden / "lock").touch()
    (tmp_path / "saved").rename(hidden / "old")
    with pytest.warns(DyLoRAWarning, match="was interrupted"):
        assert load(tmp_path / "saved", tiny_base(num_hidden_layers=1)).experts.names == OLD
    assert whole_folders.clear_killed(tmp_path / "saved") == [hidden.name]
    assert contents(tmp_path / "saved") == before and not hidden.exists()


def test_what_a_living_process_writes_is_left_alone(base, tmp_path):
    with whole_folders.written_aside(tmp_path / "saved") as aside:
        (aside / "part").touch()
        assert whole_folders.clear_killed(tmp_path / "saved") == []
        assert (aside / "part").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_message_and_the_older_checkpoint_stays(base, tmp_path):
    """The system's own limit on the size of a file, which safetensors meets first; its error is no OSError."""
    model = tiny_moe(tiny_base(num_hidden_layers=1), num_experts=2)
    model.save_pretrained(str(tmp_path / "saved"))
    before, (soft, hard) = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot save .*saved: File too large; .*what was there stays"):
            model.save_pretrained(str(tmp_path / "saved"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before
