"""How long the command line takes to answer: CPU time of a whole process, beside the imports that it avoids.

    python benchmarks/speed/startup.py [--rounds 5] [--json startup.json]

Each command runs in a process of its own, all of them in turns, so that a slow moment of the machine meets each alike.
Measured is the CPU time, user and system together, of the process and those that it starts, which hardly depends on
what else runs; the first round, which fills the file cache and writes bytecode, does not count. Prints a markdown table
of the medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DYLORA = [sys.executable, "-m", "dylo_moe.cli"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import dylo_moe": [sys.executable, "-c", "import dylo_moe"],
    "dylora --version": [*DYLORA, "--version"],
    "dylora --help": [*DYLORA, "--help"],
    "dylora tarin (mistyped)": [*DYLORA, "tarin"],
    **{f"dylora {name} --help": [*DYLORA, name, "--help"] for name in ("train", "stream", "compare", "eval", "export")},
    "dylora train --help_all": [*DYLORA, "train", "--help_all"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import transformers": [sys.executable, "-c", "import transformers"],
    "from transformers import TrainingArguments": [sys.executable, "-c", "from transformers import TrainingArguments"],
    "from dylo_moe import DyLoRAMoE": [sys.executable, "-c", "from dylo_moe import DyLoRAMoE"],
}
"""What is measured; those that import PyTorch come last."""


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of one process and its children."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=variables)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for behind the object's back
    return usage.ru_utime + usage.ru_stime


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of every round by what was run."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, command in COMMANDS.items():
            taken = cpu_seconds(command)
            if turn:
                seconds[name].append(taken)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown, a line for each command."""
    lines = ["| | CPU seconds | least to most |", "|---|---|---|"]
    for name, values in seconds.items():
        lines.append(f"| `{name}` | {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is run, after one round to warm up")
    parser.add_argument("--json", type=Path, help="also write the seconds of every round here")
    arguments = parser.parse_args()
    seconds = measure(arguments.rounds)
    print(table(seconds))
    if arguments.json:
        arguments.json.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
