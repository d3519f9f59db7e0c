"""Laws of a folder's owner: a second process is refused at once, and what the first has locked is free when it dies."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

import pytest
from reference.runs import flags, tiny_run_folder

from dylo_moe.cli import main
from dylo_moe.commands.stream.request import parse_stream
from dylo_moe.commands.train.request import parse_train, settings_of
from dylo_moe.training.run_folder import save_config
from dylo_moe.utils.locks import is_held
from dylo_moe.utils.owner import OWNER, Owner


@contextmanager
def owned(folder, what="training"):
    """Another process that owns a folder; yields its id."""
    child = os.fork()
    if child == 0:
        try:
            Owner().take(folder, what)
            if os.fork() == 0:  # a worker, which outlives it
                time.sleep(5)
                os._exit(0)
            time.sleep(60)
        finally:
            os._exit(1)
    while not (folder / OWNER).is_file() or not (folder / OWNER).read_text():
        time.sleep(0.01)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with owned(tmp_path / "run") as child, Owner() as mine:
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"another process is training in .*process {child} on .*wait for it"):
                mine.take(tmp_path / "run", "training")
    assert not is_held(tmp_path / "run" / OWNER)
    with Owner() as mine:
        mine.take(tmp_path / "run", "training")
        mine.take(tmp_path / "run", "training")
        with Owner() as other, pytest.raises(ValueError, match="another process"):
            other.take(tmp_path / "run", "training")
        with pytest.raises(ChildProcessError), owned(tmp_path / "run"):
            raise ChildProcessError
        assert is_held(tmp_path / "run" / OWNER)
    assert not (tmp_path / "run" / OWNER).exists()


def test_nothing_is_left_where_nothing_was_made(tmp_path):
    with Owner() as mine:
        mine.take(tmp_path / "evaluation" / "one", "evaluating")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "stream", "compare"])
def test_a_folder_in_use_is_one_line_and_status_2(tmp_path, capsys, command):
    """Before data and weights are read; the folder stays as it is."""
    folder, run = tiny_run_folder(tmp_path), tmp_path / "run"
    run.mkdir()
    words = ["--resume_from_checkpoint", str(run)]
    if command == "compare":
        words = flags(folder, run)
    elif command == "train":
        save_config(settings_of(parse_train(flags(folder, tmp_path / "other"))), run / "config.yaml")
    else:
        new = ["--model", str(folder / "base"), "--datasets", str(folder / "low.jsonl"), "--use_cpu", "true"]
        save_config(parse_stream([*new, "--output_dir", str(tmp_path / "other")]).settings, run / "config.yaml")
        (run / "stream.json").write_text('{"state": "running", "processes": 1}')
    capsys.readouterr()
    with owned(run):
        before = {path: path.read_bytes() for path in run.iterdir()}
        assert main([command, *words]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "another process is" in said[0] and str(run) in said[0], said
        assert {path: path.read_bytes() for path in run.iterdir()} == before
