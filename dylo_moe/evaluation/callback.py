"""Evaluation while training: greedy answers to a benchmark's first problems every so many steps, logged like losses."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dylo_moe.evaluation.answers import Decoding
from dylo_moe.evaluation.arguments import EvalArguments
from dylo_moe.evaluation.benchmark import Benchmark, Progress, files_of, run_benchmark
from dylo_moe.evaluation.names import BENCHMARKS, COMPLETION
from dylo_moe.evaluation.problems import load_examples, load_problems
from dylo_moe.evaluation.prompts import Asking
from dylo_moe.evaluation.sandbox.isolation import BUBBLEWRAP, Limits
from dylo_moe.evaluation.sandbox.sandbox import Sandbox, open_sandbox
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.words import counted


class BenchmarkSchedule(NamedTuple):
    """The benchmarks that are evaluated while training, and how often."""

    benchmarks: list[Benchmark]
    sandbox: Sandbox
    every: int
    """The number of optimizer steps between evaluations."""


def plan_benchmarks(
    wanted: str | None,
    *,
    every: int | None,
    allow_code_execution: bool | None,
    sandbox: str | None,
    data_dir: str | None,
    seed: int,
) -> BenchmarkSchedule | None:
    """The evaluations that the flags of `dylora train` ask for, or None; the sandbox is tried here.

    Args:
        wanted: the value of --eval_benchmark: NAME:COUNT, or NAME for all problems; several are separated by commas.
        every: the value of --eval_benchmark_steps.
        allow_code_execution, sandbox, data_dir, seed: the values of the flags of these names.

    Raises:
        ValueError: if one of the flags is missing or cannot apply, or the problems are not available.
        SandboxError: if generated code cannot be isolated.
    """
    check_benchmark_flags(wanted, every=every, allow_code_execution=allow_code_execution, sandbox=sandbox)
    if wanted is None or every is None:
        return None
    counts = [read_count(part) for part in wanted.split(",")]
    defaults = EvalArguments()
    benchmarks = [
        Benchmark(
            load_problems(name, data_dir)[:count],
            Asking(name, COMPLETION, tuple(load_examples(name, data_dir))),
            Decoding("greedy"),
            batch_size=defaults.batch_size,
            max_new_tokens=defaults.max_new_tokens,
            seed=seed,
        )
        for name, count in counts
    ]
    return BenchmarkSchedule(benchmarks, open_sandbox(sandbox or BUBBLEWRAP, Limits()), every)


def check_benchmark_flags(
    wanted: str | None, *, every: int | None, allow_code_execution: bool | None, sandbox: str | None
) -> None:
    """Raises ValueError where one of the flags of `plan_benchmarks` is missing or cannot apply."""
    if wanted is None:
        given = {"eval_benchmark_steps": every, "allow_code_execution": allow_code_execution, "sandbox": sandbox}
        names = [name for name, value in given.items() if value]
        if names:
            raise ValueError(f"{', '.join(names)} would change nothing without eval_benchmark (humaneval:20)")
        return
    if every is None or every < 1:
        raise ValueError(
            f"eval_benchmark_steps is {every}; with eval_benchmark it must be 1 or more, the steps between evaluations"
        )
    if not allow_code_execution:
        raise ValueError(
            "eval_benchmark runs programs that the model writes, unseen by anyone: add --allow_code_execution to "
            "let each of them run, isolated from your files and the network (--sandbox: how)"
        )
    for part in wanted.split(","):
        read_count(part)


def read_count(text: str) -> tuple[str, int | None]:
    """Parse NAME:COUNT or NAME. Raises ValueError for anything else."""
    name, colon, count = text.strip().partition(":")
    if name not in BENCHMARKS or (colon and (not count.isdigit() or int(count) < 1)):
        raise ValueError(
            f"eval_benchmark is {text!r}; it must be {' or '.join(BENCHMARKS)}, with :COUNT for the first ones only"
        )
    return name, int(count) if colon else None


class BenchmarkCallback(TrainerCallback):
    """Runs benchmarks during training and logs `eval_NAME_pass_at_1`, its interval and counts.

    Rank 0 generates and judges while the other ranks wait for its result. The samples of each evaluation are kept in
    evaluation/step-STEP of the run's folder. The random state and the model's mode are restored, so a run with
    evaluations trains bit for bit as one without.

    Args:
        folder: the run's folder.
        log: the Trainer's method `log`.
        between: called after each batch and verdict, if only one process trains; it may raise to end the evaluation.
        pause: called with the seconds that an evaluation took, which do not count as training.
    """

    def __init__(
        self,
        plan: BenchmarkSchedule,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        *,
        screen: Screen,
        log: Callable[[dict[str, float]], None],
        between: Callable[[], Any],
        pause: Callable[[float], None],
    ) -> None:
        self.plan, self.tokenizer, self.folder, self.screen = plan, tokenizer, folder, screen
        self.log, self.between, self.pause = log, between, pause

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Evaluate, if the schedule is due at this step."""
        if state.global_step % self.plan.every:
            return
        started = time.monotonic()
        found: list[dict[str, float]] = [{}]
        if state.is_world_process_zero:
            folder = self.folder / "evaluation" / f"step-{state.global_step}"
            shutil.rmtree(
                folder, ignore_errors=True
            )  # left by this step before the run was resumed from an earlier one
            folder.mkdir(parents=True)
            for benchmark in self.plan.benchmarks:
                found[0] |= self._evaluate(benchmark, model, folder, state.global_step, alone=args.world_size == 1)
        broadcast_object_list(found)
        self.pause(time.monotonic() - started)
        is_log_due = control.should_log  # any log resets it, but the Trainer's own may still be due
        self.log(found[0])
        control.should_log = is_log_due

    def _evaluate(self, benchmark: Benchmark, model: Any, folder: Path, step: int, *, alone: bool) -> dict[str, float]:
        def tell(progress: Progress) -> None:
            if alone:
                self.between()

        samples, verdicts = files_of(folder, benchmark)
        sandbox = self.plan.sandbox
        outcome = run_benchmark(
            benchmark, model, self.tokenizer, sandbox, samples=samples, verdicts=verdicts, k=[1], tell=tell
        )
        name, rate, late = benchmark.asking.benchmark, outcome.rates[0], outcome.counts["timed out"]
        first = f"the first {counted(rate.num_tasks, 'problem')}"
        self.screen.progress(f"step {step}: {name} pass@1 {rate.rate:.3f} of {first}, {late} timed out")
        return {
            f"eval_{name}_pass_at_1": rate.rate,
            f"eval_{name}_pass_at_1_low": rate.interval.low,
            f"eval_{name}_pass_at_1_high": rate.interval.high,
            f"eval_{name}_num_tasks": rate.num_tasks,
            f"eval_{name}_timed_out": late,
            f"eval_{name}_tokens_per_second": outcome.tokens / max(outcome.seconds, 1e-9),
        }
