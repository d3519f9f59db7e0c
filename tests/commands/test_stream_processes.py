"""Streams of several processes over gloo: what they learn, what a lost one leaves, and who may go on."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from reference.forks import forked, signal_when
from reference.laws import Laws
from reference.runs import files_of
from safetensors.torch import load_file
from test_stream import SKILLS, skill_files, stage_checkpoints, stream

from dylo_moe.cli import main
from dylo_moe.commands.stream.agreement import agreed
from dylo_moe.continual.growth import SkillDecision
from dylo_moe.evaluation.loss_matrix import read_matrix

PLAIN = ("--lora_dropout", "0", "--optim", "sgd", "--keep_stages", "true")
"""No dropout, whose masks depend on who draws them, and plain gradient descent, whose steps go with the gradients."""


def told(log: Path) -> list[str]:
    """What the command said of its end."""
    return [line for line in log.read_text().splitlines() if line.startswith("dylora stream:")]


def of(folder: Path, into: str, rows: int) -> list[str]:
    more = (*PLAIN, "--num_train_epochs", "2", "--per_device_train_batch_size", str(rows))
    return stream(folder, folder / into, *more, "--save_steps", "3", datasets=SKILLS[:2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return skill_files(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def pair(folder):
    log = folder / "pair.log"
    assert forked(of(folder, "pair", 8), log, count=2) == [0, 0], log.read_text()
    return folder / "pair"


def near(laws: Laws, law: str, ours: Path, theirs: Path) -> None:
    """Every checkpoint's weights agree, relative to the largest number of their matrix; so do all losses."""
    for one, other in zip(stage_checkpoints(ours), stage_checkpoints(theirs), strict=True):
        assert files_of(one).keys() == files_of(other).keys()
        for name in files_of(one):
            mine, yours = load_file(one / name), load_file(other / name)
            assert mine.keys() == yours.keys()
            for key in mine:
                largest = yours[key].abs().max().clamp(min=1e-12)
                laws.close(law, mine[key] / largest, yours[key] / largest, atol=2e-6)
    for one, other in zip(*(read_matrix(run / "matrix.json").stages for run in (ours, theirs)), strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5) and one.tokens == other.tokens
        assert one.decision["expert"] == other.decision["expert"]


def test_two_processes_learn_what_one_learns(folder, pair, laws, caplog):
    """The last batch of every pass, of 54 rows, is not shared evenly."""
    assert main(of(folder, "alone", 16)) == 0
    near(laws, "a stream of two processes = one, weights", pair, folder / "alone")
    said = pair.with_suffix(".log").read_text()
    assert said.count("The whole stream took") == said.count("stage 2: sky") == 1
    assert len(stage_checkpoints(pair)) == 2
    assert "is dead" not in caplog.text  # a bug once: a stage warned of all experts but its own


def test_a_stream_goes_on_after_a_lost_process_and_a_signal(folder, pair, laws):
    """With as many processes bit-equal, with another number within rounding; each end is told once."""
    cut = folder / "cut"
    saved = lambda: any(cut.glob("stages/02_*/checkpoint-3/dylora.json"))  # noqa: E731
    lost = signal_when(saved, signal.SIGKILL, which=slice(1, 2))
    assert forked(of(folder, "cut", 8), folder / "1.log", count=2, interrupt=lost) == [1, -signal.SIGKILL]
    how = f"with the same launcher and: -m dylo_moe.cli stream --resume_from_checkpoint {cut}"
    assert told(folder / "1.log") == [f"dylora stream: another process of this stream has gone; resume {how}"]
    shutil.copytree(cut, folder / "one")
    again = ["stream", "--resume_from_checkpoint", str(cut)]
    resumed = lambda: (folder / "2.log").exists() and "stage 2" in (folder / "2.log").read_text()  # noqa: E731
    stopped = signal_when(resumed, signal.SIGTERM)
    assert forked(again, folder / "2.log", count=2, interrupt=stopped) == [128 + signal.SIGTERM] * 2
    assert told(folder / "2.log") == [f"dylora stream: stopped by SIGTERM; resume {how}"]
    assert forked(again, folder / "3.log", count=2) == [0, 0], (folder / "3.log").read_text()
    for one, other in zip(stage_checkpoints(cut), stage_checkpoints(pair), strict=True):
        assert files_of(one) == files_of(other)
    assert main(["stream", "--resume_from_checkpoint", str(folder / "one")]) == 0
    near(laws, "a stream of two processes goes on with one, weights", folder / "one", pair)


def test_processes_that_judge_otherwise_are_refused(monkeypatch):
    decision = SkillDecision("sea", True, 3.0, 2.0, "sky", 0.1, "grown", "sea")
    monkeypatch.setattr("dylo_moe.utils.distributed.differing", lambda value: [1])
    with pytest.raises(ValueError, match="process 1 of this stream judges sea otherwise than process 0"):
        agreed(None, "sea", decision)


def test_a_launcher_that_shares_the_base_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(of(folder, "sharded", 8)) == 2
    assert "launch it with DDP" in capsys.readouterr().err and not (folder / "sharded").exists()
