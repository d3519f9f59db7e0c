"""Kill `train.py` with SIGKILL at random moments, let it go on, and compare its end with an uninterrupted run's.

    python benchmarks/runs/kills.py                      # 20 kills on the real small model
    python benchmarks/runs/kills.py --kills 3 --model FOLDER --datasets a.jsonl,b.jsonl

Each trial starts the same run in a folder of its own and kills it: every other time as soon as a save is seen under way
(at a random one of the saves), else at a moment drawn from the whole length of the run, imports and loading included.
Then the same command with `--resume_from_checkpoint auto` runs to the end. Experts, router, optimizer and metrics must
be those of the run that nobody killed, bit for bit. Ends with status 1 where they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("time", "runtime", "per_second", "total_flos")


def command(options: argparse.Namespace, folder: Path, *more: str) -> list[str]:
    """The run of every trial."""
    return [
        *(sys.executable, str(ROOT / "train.py"), "--model", options.model, "--datasets", options.datasets),
        *("--num_experts", "2", "--lora_r", "8", "--lora_dropout", "0.1", "--max_seq_length", "48"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"),
        *("--max_steps", str(options.steps), "--training_subset", options.subset, "--eval_subset", options.subset),
        *("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2", "--eval_strategy", "steps"),
        *("--eval_steps", "4", "--logging_steps", "1", "--use_cpu", "true", "--output_dir", str(folder), *more),
    ]


def start(words: list[str], log: Path) -> subprocess.Popen:
    """The process, with what it says going to a file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(words, cwd=log.parent, env=environment, stdout=file, stderr=file)


def finish(words: list[str], log: Path) -> None:
    """Run to the end. Raises RuntimeError with the last lines where that fails."""
    if start(words, log).wait() != 0:
        raise RuntimeError("\n".join(log.read_text(errors="replace").splitlines()[-15:]))


def outcome(folder: Path) -> dict[str, str]:
    """Hashes of what a run ends with."""
    files = sorted([*folder.glob("checkpoint/experts/*/*.safetensors"), folder / "checkpoint" / "router.safetensors"])
    found = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    digest = hashlib.sha256()
    for number, values in torch.load(last / "optimizer.pt", weights_only=True)["state"].items():
        for name, value in sorted(values.items()):
            digest.update(f"{number} {name}".encode() + value.numpy().tobytes())
    found[f"{last.name}/optimizer"] = digest.hexdigest()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train_runtime" not in line]
    lines = [{key: value for key, value in line.items() if not any(part in key for part in TIMES)} for line in lines]
    found["metrics.jsonl"] = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    return found


def kill(process: subprocess.Popen, folder: Path, *, seconds: float, save: int | None) -> str:
    """Kill after some seconds, or while that save is under way; says when."""
    began, seen, last = time.monotonic(), 0, ""
    while process.poll() is None and (save is not None or time.monotonic() - began < seconds):
        unfinished = [path.name for path in folder.glob(".checkpoint-*")] if folder.is_dir() else []
        if unfinished and unfinished[0] != last:
            seen, last = seen + 1, unfinished[0]
            if seen == save:
                time.sleep(random.random() * 0.02)
                break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    checkpoints = [name for name in left if name.startswith(("checkpoint-", ".checkpoint-"))]
    return f"after {time.monotonic() - began:5.1f} s; left {', '.join(checkpoints) or 'no checkpoint'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--datasets", default="cmake,english_reference")
    parser.add_argument("--subset", default="20", help="percent of the datasets' rows")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    same = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        began = time.monotonic()
        finish(command(options, place / "whole"), place / "whole.log")
        length = time.monotonic() - began
        expected = outcome(place / "whole")
        print(f"uninterrupted: {length:.1f} s, {options.steps} steps, a save every 2", flush=True)
        for trial in range(options.kills):
            folder, log = place / f"trial-{trial}", place / f"trial-{trial}.log"
            save = random.randint(1, options.steps // 2) if trial % 2 else None
            process = start(command(options, folder), log)
            told = kill(process, folder, seconds=random.uniform(0, length), save=save)
            try:
                finish(command(options, folder, "--resume_from_checkpoint", "auto"), log)
                differing = [key for key, value in outcome(folder).items() if expected.get(key) != value]
                verdict = f"differs: {', '.join(differing)}" if differing else "bit-equal"
            except (RuntimeError, OSError, ValueError) as error:
                verdict = f"did not go on: {error}"
            same += verdict == "bit-equal"
            print(f"kill {trial + 1:2d} {'in a save' if save else 'anywhere '} {told}: {verdict}", flush=True)
    print(f"{same} of {options.kills} went on and ended bit-equal")
    return 0 if same == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
