"""A real process, killed; the long form is benchmarks/runs/kills.py, which this runs in small."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from reference.paths import ROOT
from reference.runs import files_of, flags, tiny_run_folder

from dylo_moe.model.checkpoint import read_manifest
from dylo_moe.training.run_folder import checkpoints_in


def test_killed_processes_go_on_and_end_bit_equal(tmp_path):
    """One killed anywhere, one in the middle of a save."""
    folder = tiny_run_folder(tmp_path)
    words = ["--model", str(folder / "base"), "--datasets", f"{folder / 'low.jsonl'},{folder / 'high.jsonl'}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "runs" / "kills.py"), "--kills", "2", "--subset", "100", *words],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 went on and ended bit-equal" in done.stdout


def test_sigterm_ends_a_real_process_with_a_whole_checkpoint(tmp_path):
    folder = tiny_run_folder(tmp_path)
    words = flags(folder, tmp_path / "run", "--save_strategy", "no", "--num_epochs", "100000")
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words],
            stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"lm_loss"' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM, (tmp_path / "said").read_text()
    [(step, checkpoint)] = checkpoints_in(tmp_path / "run")
    assert read_manifest(checkpoint)["training"]["step"] == step > 0
    assert files_of(checkpoint)
    last = (tmp_path / "said").read_text().strip().splitlines()[-1]
    assert last.startswith("dylora train: stopped by SIGTERM; saved")
    assert "train --resume_from_checkpoint" in last
