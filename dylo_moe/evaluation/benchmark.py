"""Run one benchmark with one decoding: generate answers in batches, judge them meanwhile, and count the results."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from dylo_moe.base.limits import context_of
from dylo_moe.evaluation.answers import Answer, Decoding, answer_batch, batch_seed
from dylo_moe.evaluation.continuation import end_ids
from dylo_moe.evaluation.pass_at_k import PassRate, pass_rate
from dylo_moe.evaluation.problems import Problem
from dylo_moe.evaluation.prompts import Asking, to_judge
from dylo_moe.evaluation.samples import FINISHES, Completion, SampleFile, VerdictFile
from dylo_moe.evaluation.sandbox.sandbox import Program, Verdict
from dylo_moe.model.model import DyLoRAMoE

TIMED_OUT = "timed out"


class Judge(Protocol):
    """The interface of what judges programs, such as `sandbox.Sandbox`."""

    def judge(self, program: Program) -> Verdict:
        """Judge a program. Blocks until there is a verdict; may be called from several threads."""
        ...


class Progress(NamedTuple):
    """How much of a benchmark is generated and judged so far."""

    num_samples: int
    num_generated: int
    num_judged: int
    num_passed: int
    num_timed_out: int
    rate: float | None
    """The mean over tasks of the share of their judged samples that passed: pass@1 so far. None before any verdict."""
    tokens_per_second: float | None
    """The speed of generation so far, earlier runs of the same benchmark included."""


class Outcome(NamedTuple):
    """The results of a benchmark with one decoding."""

    rates: list[PassRate]
    """The estimates of pass@k, in the order of the requested k."""
    counts: dict[str, int]
    """The number of "samples", of those that "passed", "failed" or "timed out", and of answers that ended at a "stop",
    at an "end" or by "length"."""
    experts: dict[str, float]
    """The share of all generated tokens that each expert generated."""
    tokens: int
    seconds: float
    """The time that generation took."""
    row_steps: int
    """Rows times decoding steps: all positions that were decoded, including rows that waited for others."""

    def as_json(self) -> dict[str, Any]:
        """The results as they are written to results.json."""
        return {
            **{f"pass@{rate.k}": rate.rate for rate in self.rates},
            "interval": self.rates[0].interval.as_json(),
            "intervals": {f"pass@{rate.k}": rate.interval.as_json() for rate in self.rates},
            "num_tasks": self.rates[0].num_tasks,
            "counts": self.counts,
            "experts": self.experts,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 2) if self.seconds else None,
            "row_steps_per_second": round(self.row_steps / self.seconds, 2) if self.seconds else None,
        }


class Benchmark:
    """The definition of a benchmark: its problems, how they are asked, and how answers are drawn.

    Args:
        problems: the tasks, in order.
        asking: how they are put to the model.
        decoding: how answers are drawn.
        batch_size: the number of answers generated together; with another number samples are not the same.
        max_new_tokens: the longest answer, if the base's context has room for it.
        seed: the seed of the sampling and of the intervals.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        asking: Asking,
        decoding: Decoding,
        *,
        batch_size: int,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.problems = {problem.task_id: problem for problem in problems}
        self.asking, self.decoding = asking, decoding
        self.batch_size, self.max_new_tokens, self.seed = batch_size, max_new_tokens, seed
        self._prompts: dict[str, list[int]] = {}
        self._ends: list[int] = []

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(task_id, sample) of all samples, in the order in which they are generated."""
        return [(task_id, sample) for task_id in self.problems for sample in range(self.decoding.num_samples)]

    def generate(
        self, model: DyLoRAMoE, tokenizer: PreTrainedTokenizerBase, number: int, keys: Sequence[tuple[str, int]]
    ) -> list[Completion]:
        """Generate one batch of samples.

        Args:
            number: the number of the batch in the whole run, from which its seed follows.
            keys: (task_id, sample) of each sample.
        """
        problems = [self.problems[task_id] for task_id, _ in keys]
        prompts = self._tokenised(tokenizer)
        room = self.room(model, tokenizer)
        answers = answer_batch(
            model,
            tokenizer,
            [prompts[task_id] for task_id, _ in keys],
            decoding=self.decoding,
            stops=self.asking.stops,
            end_ids=self._ends,
            max_new_tokens=self.max_new_tokens if room is None else min(self.max_new_tokens, room),
            seed=batch_seed(self.seed, number),
        )
        return [
            self._sample(key, problem, answer) for key, problem, answer in zip(keys, problems, answers, strict=True)
        ]

    def _tokenised(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
        """The token ids of all prompts, by task. They are made once, as are the end tokens: a chat template is asked
        what it writes, which takes a while."""
        if not self._prompts:
            ids = self.asking.ids(self.problems.values(), tokenizer)
            self._prompts, self._ends = dict(zip(self.problems, ids, strict=True)), end_ids(tokenizer)
        return self._prompts

    def room(self, model: DyLoRAMoE, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The number of tokens that the base's context leaves for an answer to the longest prompt; None: no limit.

        Raises:
            ValueError: if it leaves none.
        """
        context = context_of(model.base)
        if context is None:
            return None
        task_id, longest = max(self._tokenised(tokenizer).items(), key=lambda item: len(item[1]))
        length = len(longest)
        if length >= context:
            raise ValueError(
                f"the prompt of {task_id} has {length} tokens, and the base reads {context}; use another base"
            )
        return int(context - length)

    def _sample(self, key: tuple[str, int], problem: Problem, answer: Answer) -> Completion:
        return Completion(
            task_id=key[0],
            sample=key[1],
            completion=answer.text,
            solution=self.asking.program(problem, answer.text),
            **{name: value for name, value in answer._asdict().items() if name != "text"},
        )

    def outcome(self, judged: Sequence[tuple[Completion, Verdict]], k: Sequence[int]) -> Outcome:
        """Count samples and their verdicts, and estimate pass@k.

        Raises:
            ValueError: for a k above the number of samples.
        """
        per_task = {task_id: [0, 0] for task_id, _ in self.keys}
        counts = Counter({name: 0 for name in ("samples", "passed", "failed", TIMED_OUT, *FINISHES)})
        for sample, verdict in judged:
            per_task[sample.task_id][0] += 1
            per_task[sample.task_id][1] += verdict.passed
            counts["samples"] += 1
            counts["passed" if verdict.passed else TIMED_OUT if verdict.result == TIMED_OUT else "failed"] += 1
            counts[sample.finish] += 1
        pairs = [(num_samples, num_passed) for num_samples, num_passed in per_task.values()]
        samples = [sample for sample, _ in judged]
        return Outcome(
            [pass_rate(pairs, each, seed=self.seed) for each in k],
            dict(counts),
            expert_shares(samples),
            sum(sample.tokens for sample in samples),
            math.fsum(sample.seconds for sample in samples),
            sum(sample.steps for sample in samples),
        )


def run_benchmark(
    benchmark: Benchmark,
    model: DyLoRAMoE,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    *,
    samples: SampleFile,
    verdicts: VerdictFile,
    k: Sequence[int],
    tell: Callable[[Progress], None],
) -> Outcome:
    """Generate the missing samples, judge samples while others are generated, and count the results.

    Args:
        samples, verdicts: the files of an earlier run, or empty ones; new samples and verdicts are appended.
        tell: called with the progress after each batch and each verdict, in the caller's thread.

    Raises:
        Exception: any that the judge raises; samples and verdicts until then are kept.
    """
    found: dict[tuple[str, int], Verdict] = {}
    with judging(judge, benchmark, verdicts) as (submit, arrived):
        for sample in samples.samples:
            submit(sample)
        for number, keys in samples.batches:
            batch = benchmark.generate(model, tokenizer, number, keys)
            samples.append(batch)
            for sample in batch:
                submit(sample)
            found |= arrived(wait=False)
            tell(progress(benchmark, samples, found))
        while len(found) < len(samples.samples):
            found |= arrived(wait=True)
            tell(progress(benchmark, samples, found))
    return benchmark.outcome([(sample, found[sample.task_id, sample.sample]) for sample in samples.samples], k)


Arrived = Callable[..., dict[tuple[str, int], Verdict]]


@contextmanager
def judging(
    judge: Judge, benchmark: Benchmark, verdicts: VerdictFile
) -> Iterator[tuple[Callable[[Completion], None], Arrived]]:
    """Judge samples in separate threads, on half of the cores because the model needs the others.

    Each verdict is saved as it comes.

    Yields:
        A function that submits a sample to be judged, and one that returns the verdicts that arrived since its last
        call; with `wait` it first waits for one.
    """
    pending: list[Future[tuple[tuple[str, int], Verdict]]] = []

    def work(sample: Completion) -> tuple[tuple[str, int], Verdict]:
        verdict = verdicts.of(sample)
        if verdict is None:
            verdict = judge.judge(to_judge(benchmark.problems[sample.task_id], sample.solution))
            verdicts.append(sample, verdict)
        return (sample.task_id, sample.sample), verdict

    def arrived(*, wait: bool) -> dict[tuple[str, int], Verdict]:
        if wait and pending:
            pending[0].exception()
        done = [future for future in pending if future.done()]
        pending[:] = [future for future in pending if not future.done()]
        return dict(future.result() for future in done)

    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2), thread_name_prefix="judge")
    try:
        yield lambda sample: pending.append(pool.submit(work, sample)), arrived
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def progress(benchmark: Benchmark, samples: SampleFile, found: dict[tuple[str, int], Verdict]) -> Progress:
    """The progress of a benchmark, from its samples and the verdicts on them."""
    passes: dict[str, list[bool]] = {}
    for (task_id, _), verdict in found.items():
        passes.setdefault(task_id, []).append(verdict.passed)
    seconds = math.fsum(sample.seconds for sample in samples.samples)
    return Progress(
        num_samples=len(samples.keys),
        num_generated=len(samples.samples),
        num_judged=len(found),
        num_passed=sum(verdict.passed for verdict in found.values()),
        num_timed_out=sum(verdict.result == TIMED_OUT for verdict in found.values()),
        rate=math.fsum(sum(each) / len(each) for each in passes.values()) / len(passes) if passes else None,
        tokens_per_second=sum(sample.tokens for sample in samples.samples) / seconds if seconds else None,
    )


def expert_shares(samples: Sequence[Completion]) -> dict[str, float]:
    """The share of the tokens of all samples that each expert generated."""
    tokens = sum(sample.tokens for sample in samples)
    sums: Counter[str] = Counter()
    for sample in samples:
        for name, share in sample.experts.items():
            sums[name] += share * sample.tokens  # type: ignore[assignment]  # counts of tokens, in parts
    return {name: round(value / tokens, 4) for name, value in sums.items()} if tokens else {}


def files_of(folder: Path, benchmark: Benchmark) -> tuple[SampleFile, VerdictFile]:
    """The files of samples and verdicts of a benchmark in a folder."""
    name = f"{benchmark.asking.benchmark}-{benchmark.decoding.name}"
    samples = SampleFile(folder / f"{name}.jsonl", benchmark.keys, batch_size=benchmark.batch_size)
    return samples, VerdictFile(folder / f"{name}-verdicts.jsonl")
