"""The memory that `dylora plan` expects against what training takes, on the CPU.

    python benchmarks/memory/memory.py [--shapes 2x128 4x128 8x128]

Each shape (rows x tokens of a batch) is planned, then trained for a few steps in a process of its own: SmolLM2-135M,
four experts of rank 16 on all linears, fp32, on this machine's Python functions and C++ headers. Measured is the
largest resident set of the training process, with Python, libraries and weights; the processes that tokenise are not
counted. It is measured twice: as the machine is, and with `MALLOC_MMAP_THRESHOLD_=131072`, which makes glibc's malloc
map each larger block on its own and give it back when it is freed. The difference is what the C library keeps, which a
plan does not know of.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from dylo_moe.cli import main as dylora
from dylo_moe.commands.plan.request import parse_plan

RUNS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("plan", "plan", {}),
    ("mapped", "train", {"MALLOC_MMAP_THRESHOLD_": "131072"}),
    ("usual", "train", {}),
)
"""Name, what is done, and in which environment."""


def flags(shape: str, steps: int, folder: str, *more: str) -> list[str]:
    """The words of `dylora train` and `dylora plan`."""
    rows, seq = shape.split("x")
    return [
        *("--model", "smollm2-135m", "--datasets", "python_functions,cpp_headers", "--output_dir", f"{folder}/run"),
        *("--per_device_train_batch_size", rows, "--per_device_eval_batch_size", rows, "--max_seq_length", seq),
        *("--max_steps", str(steps), "--eval_strategy", "no", "--save_strategy", "no", "--use_cpu", "true"),
        *("--training_subset", "30", "--eval_subset", "2", *more),
    ]


def child(what: str, words: list[str]) -> None:
    """In a fresh process: plan, or train; print bytes as the last line."""
    if what == "plan":
        from dylo_moe.commands.plan.run import make_plan

        plan = make_plan(parse_plan(words))
        print(json.dumps({"bytes": plan.total_bytes, "parts": plan.peak.parts, "when": plan.peak.when}))
        return
    if dylora(["train", *words]):
        raise SystemExit(1)
    high = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert high is not None
    print(json.dumps({"bytes": int(high[1]) * 1024}))


def run(what: str, words: list[str], **environment: str) -> int:
    """Bytes that a fresh process printed.

    Args:
        environment: more variables of it.
    """
    command, variables = [sys.executable, __file__, "--child", what, *words], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])["bytes"]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2x128", "4x128", "8x128", "4x256"])
    parser.add_argument("--steps", type=int, default=4)
    arguments, more = parser.parse_known_args()
    print("| batch | estimate, MB | measured, blocks mapped, MB | ratio | measured, MB | ratio |")
    print("|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            estimate, mapped, usual = (
                run(what, flags(shape, arguments.steps, f"{folder}/{name}", *more), **environment)
                for name, what, environment in RUNS
            )
        cells = [f"{size / 1e6:,.0f} | {estimate / size:.2f}" for size in (mapped, usual)]
        print(f"| {shape} | {estimate / 1e6:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
