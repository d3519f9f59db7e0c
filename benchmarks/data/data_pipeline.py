"""How fast data becomes training rows, and in how much memory.

    python benchmarks/data/data_pipeline.py [--rows 200000] [--workers 1 2]

Writes datasets of generated text to a temporary folder, then reads, tokenises, deduplicates, splits and mixes them
in a process of its own with an empty cache, once for each number of workers, and a second time from the cache. Memory
is the largest sum of resident memory seen over the process and its workers, sampled every 50 ms: RSS counts shared
pages and the pages of mapped files in every process, PSS divides them among the processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

MODEL = "smollm2-135m"
WORDS = (  # noqa: SIM905
    "the of a number list return value string sum given find each from is all first with between sorted index"
).split()

LOAD = """
import json, sys, time
from dylo_moe.base.loading import load_tokenizer
from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
tokenizer = load_tokenizer(sys.argv[1])
started = time.perf_counter()
data = load_data(
    DataConfig(datasets=sys.argv[3:], interleaved_sampling=True, preprocessing_num_workers=int(sys.argv[2])), tokenizer
)
loaded = time.perf_counter()
tokens = 0
for row in data.train:
    tokens += row["length"]
ended = time.perf_counter()
print(json.dumps([loaded - started, ended - loaded, len(data.train), tokens, sum(c.read for c in data.counts)]))
"""


class Memory(NamedTuple):
    """Bytes, summed over a process and its children."""

    rss: int
    pss: int


def write_rows(path: Path, count: int, *, seed: int) -> None:
    """Instructions with an answer in code, 40 to 400 words, none like another."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            asked = " ".join(draw.choices(WORDS, k=draw.randint(10, 60)))
            lines = [f"    x{line} = {' + '.join(draw.choices(WORDS, k=5))}" for line in range(draw.randint(5, 60))]
            row = {"instruction": f"Task {number}: {asked}", "input": "", "output": "def f():\n" + "\n".join(lines)}
            file.write(json.dumps(row) + "\n")


def memory_of(process: int) -> Memory:
    """Of a process and all below it; what ends while it is read counts as nothing."""
    rss = pss = 0
    for number in [process, *children(process)]:
        try:
            fields = dict(
                line.split(":", 1) for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()[1:]
            )
        except (OSError, ValueError):
            continue
        rss += int(fields["Rss"].split()[0]) * 1024
        pss += int(fields["Pss"].split()[0]) * 1024
    return Memory(rss, pss)


def children(process: int) -> list[int]:
    """All processes below one."""
    try:
        own = [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return own + [further for child in own for further in children(child)]


def run(datasets: list[Path], workers: int, cache: Path) -> tuple[list[float], Memory]:
    """What one loading took, and the most memory it had."""
    command = [sys.executable, "-c", LOAD, MODEL, str(workers), *map(str, datasets)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    most = Memory(0, 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            most = Memory(*map(max, zip(most, memory_of(process.pid), strict=True)))
            time.sleep(0.05)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"loading ended with {process.returncode}")
    return json.loads(printed), most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shares = (0.75, 0.25)
        datasets = [Path(folder, f"generated_{place}.jsonl") for place in range(len(shares))]
        for place, (path, share) in enumerate(zip(datasets, shares, strict=True)):
            write_rows(path, round(arguments.rows * share), seed=place)
        size = sum(path.stat().st_size for path in datasets)
        print(f"{arguments.rows:,} rows, {size / 1e6:.0f} MB of JSON lines, {os.cpu_count()} cores\n")
        print(
            "| workers | cache | load, s | rows a second | read once, s | rows of an epoch | tokens | RSS, GB | "
            "PSS, GB |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for workers in arguments.workers:
            for state in ("empty", "filled"):
                (load, walk, rows, tokens, read), most = run(datasets, workers, Path(folder, f"cache-{workers}"))
                cells = f"{load:.1f} | {read / load:,.0f} | {walk:.1f} | {rows:,} | {tokens:,}"
                print(f"| {workers} | {state} | {cells} | {most.rss / 1e9:.2f} | {most.pss / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
