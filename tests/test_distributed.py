"""Runs of several processes by the commands a user types: torchrun and accelerate launch, over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference.runs import files_of, flags, tiny_run_folder, trained
from safetensors.torch import load_file

from dylo_moe.arguments import parse_train
from dylo_moe.checkpoint import CheckpointError
from dylo_moe.cli import main
from dylo_moe.resume import checkpoints_in

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PLAIN = ("--lora_dropout", "0", "--learning_rate", "1e-3", "--num_epochs", "2", "--logging_steps", "1")
"""No dropout, whose masks depend on who draws them; two passes of five steps, the last of each half empty."""
MANY = ("--num_experts", "12", "--save_strategy", "steps", "--save_steps", "6")
"""So many experts that a rank, and in some step every rank, has none for some of them."""


def launcher(processes: int, kind: str) -> list[str]:
    if kind == "torchrun":
        return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    return [
        *(str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "recipes" / f"{kind}.yaml")),
        *("--num_processes", str(processes), "--main_process_port", "0"),
    ]


def start(words: list[str], log: Path, *, processes: int = 2, kind: str = "torchrun") -> subprocess.Popen:
    with open(log, "wb") as said:
        return subprocess.Popen(
            [*launcher(processes, kind), str(ROOT / "train.py"), *words],
            stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def run(words: list[str], log: Path, *, processes: int = 2, kind: str = "torchrun") -> str:
    status = start(words, log, processes=processes, kind=kind).wait(timeout=180)
    assert status == 0, log.read_text()
    return log.read_text()


def told(text: str) -> list[str]:
    """What the command said of its end."""
    return [line for line in text.splitlines() if line.startswith("dylora train:")]


def distance(ours: Path, theirs: Path) -> float:
    """The largest difference of any number of two checkpoints, relative to the largest of its tensor."""
    worst = 0.0
    assert files_of(ours).keys() == files_of(theirs).keys()
    for name in files_of(ours):
        one, other = load_file(ours / name), load_file(theirs / name)
        for key in one:
            scale = max(float(one[key].abs().max()), 1e-12)
            worst = max(worst, float((one[key].double() - other[key].double()).abs().max()) / scale)
    return worst


def close(ours: Path, theirs: Path) -> None:
    """Both logs hold the same lines, with the same numbers within rounding; each line is there once."""
    for one, other in zip(trained(ours), trained(theirs), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"total_flos"}:  # counts padding, of which shorter batches have less
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), (one["step"], key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run_folder(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def alone(folder):
    """One process with 24 rows a step."""
    words = flags(folder, folder / "alone", *PLAIN, *MANY, "--per_device_train_batch_size", "24")
    assert main(["train", *words]) == 0
    return folder / "alone"


@pytest.fixture(scope="module")
def pair(folder, alone):
    """Two processes with 12 rows each."""
    words = flags(folder, folder / "pair", *PLAIN, *MANY, "--per_device_train_batch_size", "12")
    run(words, folder / "pair.log")
    return folder / "pair"


def test_two_processes_give_the_weights_of_one(alone, pair):
    steps = [line for line in trained(alone) if "lm_loss" in line]
    unchosen = [sum(value == 0 for key, value in line.items() if key.startswith("share_expert")) for line in steps]
    assert max(unchosen) > 0, "no expert was ever left out, so this shows less than it claims"
    assert distance(alone / "checkpoint", pair / "checkpoint") < 5e-5
    close(alone, pair)
    assert (pair.with_suffix(".log").read_text()).count("The whole run took") == 1
    assert json.loads((pair / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("kind", ["accelerate_ddp", "accelerate_fsdp2"])
def test_the_ready_configurations_give_the_weights_of_one(kind, folder, alone):
    words = flags(folder, folder / kind, *PLAIN, *MANY, "--per_device_train_batch_size", "12")
    said = run(words, folder / f"{kind}.log", kind=kind)
    how = {"accelerate_ddp": "each with all of the base", "accelerate_fsdp2": "each with a share of the base (FSDP2)"}
    assert f"2 processes, {how[kind]}: 2 x 1 x 12 rows a step" in said
    assert distance(alone / "checkpoint", folder / kind / "checkpoint") < 5e-5
    close(alone, folder / kind)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_checkpoint_of_two_goes_on_with_another_number(processes, folder, alone, pair):
    into = folder / f"on_{processes}"
    words = ["--resume_from_checkpoint", str(pair / "checkpoint-6"), "--output_dir", str(into)]
    if processes == 1:
        assert main(["train", *words]) == 0
    else:
        said = run(words, folder / "on_3.log", processes=3)
        assert "3 processes, each with all of the base: 3 x 1 x 8 rows a step" in said
        assert "the run has 3 processes, had 2" in said
    assert distance(alone / "checkpoint", into / "checkpoint") < 5e-5
    assert trained(into)[-1]["eval_loss"] == pytest.approx(trained(alone)[-1]["eval_loss"], rel=1e-5)


def test_rows_that_cannot_be_shared_are_refused(pair, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(CheckpointError, match=r"with 24 rows a step, which 5 processes .* go on with 1, 2, 3, 4, 6, 8"):
        parse_train(["--resume_from_checkpoint", str(pair)])


def test_a_mistake_that_every_rank_finds_is_told_once(folder):
    log = folder / "mistake.log"
    assert start(flags(folder, folder / "mistake", "--lora_targets", "nothing"), log).wait(timeout=120) != 0
    [line] = told(log.read_text())
    assert "nothing" in line


LONG = (
    *("--num_epochs", "4", "--save_strategy", "steps", "--save_steps", "4", "--eval_strategy", "no"),
    *("--per_device_train_batch_size", "8"),
)


def interrupt(words: list[str], log: Path, run_folder: Path, *, number: int, launcher_too: bool) -> str:
    """Start, wait for the second checkpoint, send a signal to one rank or to the launcher; returns what was said."""
    process = start(words, log)
    deadline = time.monotonic() + 120
    while process.poll() is None and len(checkpoints_in(run_folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, log.read_text()
    victim = process.pid if launcher_too else ranks_of(process.pid)[-1]
    os.kill(victim, number)
    assert process.wait(timeout=60) != 0
    return log.read_text()


def ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    run(flags(folder, folder / "whole", *LONG), folder / "whole.log")
    return folder / "whole"


@pytest.mark.parametrize(
    ("number", "launcher_too", "more"),
    [(signal.SIGKILL, False, ("--fsdp", "true")), (signal.SIGTERM, True, ())],
    ids=["a rank is killed", "all are asked to stop"],
)
def test_an_interrupted_run_says_so_once_and_ends_bit_equal(
    number, launcher_too, more, folder, uninterrupted, tmp_path
):
    """With dropout, whose masks go on too; and a sharded base gives the very bits of a whole one."""
    cut = flags(folder, tmp_path / "cut", *LONG, *more)
    said = interrupt(cut, tmp_path / "cut.log", tmp_path / "cut", number=number, launcher_too=launcher_too)
    [line] = told(said)
    last = checkpoints_in(tmp_path / "cut")[-1][1]
    expected = "stopped by SIGTERM; saved" if launcher_too else "another process of this run has gone; the last whole"
    assert expected in line and str(last) in line and "train.py --resume_from_checkpoint" in line
    run(["--resume_from_checkpoint", str(tmp_path / "cut"), *more], tmp_path / "on.log")
    assert files_of(tmp_path / "cut" / "checkpoint") == files_of(uninterrupted / "checkpoint")


def test_other_commands_and_single_processes_say_what_they_cannot(folder, tmp_path, capsys, monkeypatch):
    assert main(["train", *flags(folder, tmp_path / "run", "--fsdp", "true")]) == 2
    assert "FSDP cannot be used so: there is one process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["stream", "--model", "smollm2-135m"]) == 2
    assert "dylora stream: this command runs in one process" in capsys.readouterr().err
