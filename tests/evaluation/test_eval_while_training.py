"""Evaluation while training: it changes nothing of the training, and its results are where the losses are."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference.exams import exams, lines_of
from reference.paths import ROOT
from reference.runs import files_of, flags, tiny_run_folder, trained

from dylo_moe.cli import main
from dylo_moe.commands.stream.request import parse_stream
from dylo_moe.evaluation.callback import read_count
from dylo_moe.training.run_folder import checkpoints_in
from dylo_moe.utils.errors import UsageError

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
EVERY = 5
LEAVE = ("--allow_code_execution", "true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_run_folder(tmp_path_factory.mktemp("runs"))
    exams(folder / "mirror")
    return folder


def asked(folder: Path, wanted: str = "humaneval:3,mbpp:1", every: int = EVERY) -> list[str]:
    mirror = ["--data_dir", str(folder / "mirror")]
    return [*mirror, "--eval_benchmark", wanted, "--eval_benchmark_steps", str(every), *LEAVE]


@pytest.fixture(scope="module")
def runs(folder):
    """The same training with and without."""
    assert main(["train", *flags(folder, folder / "plain")]) == 0
    assert main(["train", *flags(folder, folder / "judged"), *asked(folder)]) == 0
    return folder / "plain", folder / "judged"


def is_judged(line: dict) -> bool:
    return any("pass_at_1" in name for name in line)


def test_training_is_bit_equal_with_and_without(runs):
    """Regression: at a step where the losses were due too, their line was lost."""
    plain, judged = runs
    assert files_of(plain / "checkpoint") == files_of(judged / "checkpoint")
    assert [line for line in trained(judged) if not is_judged(line)] == trained(plain)
    for name in ("checkpoint-7", "checkpoint-21"):
        assert files_of(plain / name) == files_of(judged / name)


def test_its_results_are_logged_where_the_losses_are(runs):
    """The first and the third of three problems of our own pass, whatever is generated."""
    lines = [line for line in trained(runs[1]) if is_judged(line)]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for line in lines:
        assert line["eval_humaneval_pass_at_1"] == 2 / 3 and line["eval_mbpp_pass_at_1"] == 0
        assert 0 < line["eval_humaneval_pass_at_1_low"] < 2 / 3 < line["eval_humaneval_pass_at_1_high"] < 1
    history = json.loads((runs[1] / "checkpoint-21" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if is_judged(line)] == [5, 10, 15, 20]


def test_its_samples_are_kept_and_are_those_of_the_model_then(runs, folder):
    """`dylora eval` gives the same for a checkpoint of the same step."""
    output = folder / "again"
    assert main(["train", *flags(folder, output), *asked(folder, "humaneval", every=7)]) == 0
    mirror = ["--data_dir", str(folder / "mirror"), "--output_dir", str(folder / "eval")]
    assert main(["eval", str(output / "checkpoint-7"), *mirror, "--tasks", "humaneval", "--allow_code_execution"]) == 0
    ours = lines_of(output / "evaluation" / "step-7" / "humaneval-greedy.jsonl")
    assert ours == lines_of(folder / "eval" / "humaneval-greedy.jsonl") and len(ours) == 5
    assert ours != lines_of(output / "evaluation" / "step-21" / "humaneval-greedy.jsonl")
    assert len(lines_of(runs[1] / "evaluation" / "step-5" / "humaneval-greedy.jsonl")) == 3


def test_a_run_that_goes_on_is_judged_as_if_it_had_not_stopped(runs, folder):
    output = folder / "stopped"
    first = ["--save_strategy", "steps", "--save_steps", "10", *asked(folder)]
    assert main(["train", *flags(folder, output), *first]) == 0
    whole = trained(output)
    shutil.rmtree(output / "checkpoint-20")
    if (output / "checkpoint-21").exists():
        shutil.rmtree(output / "checkpoint-21")
    assert [step for step, _ in checkpoints_in(output)] == [10]
    assert main(["train", "--resume_from_checkpoint", str(output)]) == 0
    assert trained(output) == whole
    assert files_of(output / "checkpoint") == files_of(runs[0] / "checkpoint")


def test_a_signal_leaves_it_between_two_batches(folder, tmp_path):
    """The process must not wait until all ten batches are through."""
    exams(tmp_path / "mirror", num_tasks=160)
    output = tmp_path / "signal"
    words = [*flags(folder, output), *asked(tmp_path, "humaneval", every=1)]
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], stdout=said, stderr=said)
    samples = output / "evaluation" / "step-1" / "humaneval-greedy.jsonl"
    while process.poll() is None and not samples.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, (tmp_path / "said").read_text()
    assert "--resume_from_checkpoint" in (tmp_path / "said").read_text().strip().splitlines()[-1]
    assert 0 < len(lines_of(samples)) < 160
    assert [step for step, _ in checkpoints_in(output)] == [1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--eval_benchmark", "humaneval:2", "--eval_benchmark_steps", "5"), "add --allow_code_execution"),
        (("--eval_benchmark", "humaneval:2", *LEAVE), "eval_benchmark_steps is None"),
        (("--eval_benchmark", "humaneval:2", "--eval_benchmark_steps", "0", *LEAVE), "eval_benchmark_steps is 0"),
        (("--eval_benchmark_steps", "5"), "eval_benchmark_steps would change nothing without eval_benchmark"),
        (("--eval_benchmark", "human:2", "--eval_benchmark_steps", "5", *LEAVE), "eval_benchmark is 'human:2'"),
        (("--eval_benchmark", "mbpp", "--eval_benchmark_steps", "5", *LEAVE, "--sandbox", "none"), "sandbox is 'none'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run_has_a_folder(folder, tmp_path, capsys, more, said):
    mirror = ("--data_dir", str(folder / "mirror"))
    assert main(["train", *flags(folder, tmp_path / "run"), *mirror, *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["humaneval:", "humaneval:0", "humaneval:x", "", "losses:3"])
def test_a_count_is_a_number(text):
    with pytest.raises(ValueError, match="eval_benchmark is "):
        read_count(text)
    assert read_count("mbpp") == ("mbpp", None) and read_count(" humaneval:20") == ("humaneval", 20)


def test_a_stream_does_not_take_flags_that_it_would_ignore():
    with pytest.raises(UsageError, match="--eval_benchmark is not offered: a stream evaluates by loss"):
        parse_stream(["--datasets", "x", "--eval_benchmark", "humaneval:2"])


def test_losses_of_a_run_lie_beside_its_checkpoint_which_stays_whole(runs, capsys):
    checkpoint = runs[1] / "checkpoint"
    assert main(["eval", str(checkpoint)]) == 0
    assert main(["eval", str(checkpoint), "--expert", "expert_1"]) == 0
    results = [json.loads((runs[1] / "evaluation" / name / "results.json").read_text()) for name in NAMES]
    last = [line for line in trained(runs[1]) if "eval_low_loss" in line][-1]
    ours = results[0]["losses"]["model"]
    assert last["eval_low_loss"] == pytest.approx(ours["datasets"]["low"]["value"], abs=1e-5), ours
    assert results[0]["losses"]["base"] == results[1]["losses"]["base"] != results[1]["losses"]["model"]
    capsys.readouterr()
    assert main(["eval", str(checkpoint)]) == 0
    assert "losses were already measured" in capsys.readouterr().out
    assert main(["eval", str(checkpoint), "--eval_subset", "50"]) == 2
    assert "eval_subset is 50.0, was None" in capsys.readouterr().err


NAMES = ("checkpoint", "checkpoint-expert_1")
