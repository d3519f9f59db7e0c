"""One run by one process and by several, which share the rows of each step: what they end with, and how fast they were.

    python benchmarks/runs/processes.py                     # the quickstart's data, 2 processes on a CPU
    python benchmarks/runs/processes.py --processes 8 --rows 32 --max_steps 50 -- --config recipes/code.yaml --bf16

What follows `--` are flags of `dylora train`. The run is done alone, under DDP and under FSDP2, one after the other,
without dropout, whose masks depend on who draws them. Printed are, against the process alone: the largest difference of
any number of experts and router, relative to the largest of its matrix; that of any training loss that was logged; and
the tokens per second of all processes together, which on one machine's cores say nothing about several GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--config", str(ROOT / "recipes" / "quickstart.yaml"), "--eval_subset", "5", "--use_cpu", "true")


def train(options: argparse.Namespace, folder: Path, *, processes: int, more: tuple[str, ...] = ()) -> None:
    """One run. Raises RuntimeError with the last lines where it fails."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc_per_node={processes}"]
    words = [
        *(*launcher, str(ROOT / "train.py"), *options.flags, *more),
        *("--lora_dropout", "0", "--per_device_train_batch_size", str(options.rows // processes)),
        *("--max_steps", str(options.max_steps), "--logging_steps", "1", "--eval_strategy", "no"),
        *("--save_strategy", "no", "--output_dir", str(folder)),
    ]
    threads = str(max((os.cpu_count() or 1) // processes, 1))
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-20:]))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The training lines of a run's log."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "lm_loss" in line]


def distance(ours: Path, theirs: Path) -> float:
    """The largest difference of two checkpoints, relative to the largest number of its tensor."""
    worst = 0.0
    for path in sorted([*ours.glob("experts/*/*.safetensors"), ours / "router.safetensors"]):
        one, other = load_file(path), load_file(theirs / path.relative_to(ours))
        for name, tensor in one.items():
            scale = max(float(tensor.abs().max()), 1e-12)
            worst = max(worst, float((tensor.double() - other[name].double()).abs().max()) / scale)
    return worst


def main() -> None:
    """Run and compare."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of an optimizer step, shared by the processes")
    parser.add_argument("--max_steps", type=int, default=6)
    options = parser.parse_args(words[:cut])
    options.flags = words[cut + 1 :] or list(QUICK)
    if options.processes < 2 or options.rows % options.processes:
        parser.error(f"--rows {options.rows} cannot be shared evenly by --processes {options.processes}, at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        alone = Path(scratch) / "alone"
        train(options, alone, processes=1)
        print("| processes | weights differ by | losses differ by | tokens per second |\n|---|---|---|---|")
        print(f"| 1 | | | {median(line['tokens_per_second'] for line in steps_of(alone)):,.0f} |", flush=True)
        for name, more in (("DDP", ()), ("FSDP2", ("--fsdp", "true"))):
            folder = Path(scratch) / name
            train(options, folder, processes=options.processes, more=more)
            pairs = list(zip(steps_of(alone), steps_of(folder), strict=True))
            loss = max(abs(one["lm_loss"] - other["lm_loss"]) for one, other in pairs)
            speed = median(other["tokens_per_second"] for _, other in pairs)
            weights = distance(alone / "checkpoint", folder / "checkpoint")
            print(f"| {options.processes}, {name} | {weights:.1e} | {loss:.1e} | {speed:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
