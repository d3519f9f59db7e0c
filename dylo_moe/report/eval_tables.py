"""The output of an evaluation on a terminal: one example, the progress, and tables of the results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dylo_moe.evaluation.benchmark import Benchmark, Progress
from dylo_moe.evaluation.names import BENCHMARKS
from dylo_moe.evaluation.samples import Completion
from dylo_moe.report.terminal import COLOURS
from dylo_moe.utils.screen import SECONDS_BETWEEN_LINES, Screen
from dylo_moe.utils.table import Table
from dylo_moe.utils.words import counted

TITLES = {"humaneval": "HumanEval", "mbpp": "MBPP"}


def show_example(screen: Screen, benchmark: Benchmark, sample: Completion, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print one problem as it is processed: the prompt with its special tokens, the raw answer, and the program."""
    asking = benchmark.asking
    problem = benchmark.problems[sample.task_id]
    (ids,) = asking.ids([problem], tokenizer)
    prompt = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    stops = ", ".join(map(repr, asking.stops)) or "none"
    screen.rule(f"{TITLES[asking.benchmark]}, one example: {sample.task_id}")
    for title, text in (
        (f"prompt ({asking.style})", prompt),
        ("answer, as generated", sample.completion),
        ("program that is judged", sample.solution),
    ):
        screen.say(title, style="bold")
        screen.say(text.rstrip("\n"))
    ended = {"stop": "a stop sequence", "end": "an end token", "length": "max_new_tokens"}[sample.finish]
    screen.say(f"stop sequences: {stops}; the answer ended at {ended} after {counted(sample.tokens, 'token')}")
    screen.rule()


class LiveRate:
    """Shows the progress of a benchmark: as a live line on a terminal, otherwise as a line every
    `SECONDS_BETWEEN_LINES`.

    Args:
        label: the label of the line.
        bar: the live line; None: plain lines are printed.
    """

    def __init__(self, screen: Screen, label: str, total: int, bar: Bar | None) -> None:
        self.screen, self.label, self.bar = screen, label, bar
        self.task = None if bar is None else bar.add_task(label, total=total, note="")
        self._next_line = 0.0

    def __call__(self, progress: Progress) -> None:
        """Show the progress; `run_benchmark` calls this."""
        if self.bar is not None and self.task is not None:
            note = describe(progress, is_short=self.screen.is_narrow)
            self.bar.update(self.task, completed=progress.num_judged, note=note)
        is_over, now = progress.num_judged == progress.num_samples, time.monotonic()
        if is_over or now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            self.screen.progress(
                f"{self.label}: {progress.num_generated}/{progress.num_samples} answers, {describe(progress)}"
            )


@contextmanager
def live_rate(screen: Screen, label: str, total: int) -> Iterator[LiveRate]:
    """Show the progress of a benchmark while it runs."""
    if not screen.is_live:
        yield LiveRate(screen, label, total, None)
        return
    columns = [TextColumn(label), BarColumn(bar_width=8 if screen.is_narrow else 20), MofNCompleteColumn()]
    columns += [] if screen.is_narrow else [TimeElapsedColumn()]
    with Bar(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=screen.console) as bar:
        yield LiveRate(screen, label, total, bar)


def describe(progress: Progress, *, is_short: bool = False) -> str:
    """Describe pass@1 so far, the number of timeouts, and the speed; of these the rate alone where it `is_short`."""
    rate = "nothing judged yet"
    if progress.rate is not None:
        late = f", {progress.num_timed_out} timed out" if progress.num_timed_out else ""
        rate = f"pass@1 {progress.rate:.3f} of {progress.num_judged} judged{late}"
        if is_short:
            return f"pass@1 {progress.rate:.3f}{late}"
    return rate if progress.tokens_per_second is None else f"{rate}, {progress.tokens_per_second:,.0f} tokens/s"


def show_results(screen: Screen, results: dict[str, Any]) -> None:
    """Print pass@k with intervals, and the experts that generated the answers, for every benchmark in results.json."""
    runs = [
        (TITLES[name], decoding, values)
        for name in BENCHMARKS
        for decoding, values in results.get(name, {}).items()
        if decoding in ("greedy", "sampled")
    ]
    if not runs:
        return
    columns = ["benchmark", "k", "pass@k", "interval", "tasks", "timed out", "tokens/s"]
    table = Table("pass@k, with 95 % intervals over tasks", columns)
    for title, decoding, values in runs:
        counts = values["counts"]
        own = [f"{values['num_tasks']:,}", f"{counts['timed out']:,}", f"{values['tokens_per_second']:,}"]
        for place, (name, interval) in enumerate(values["intervals"].items()):
            ends = "not known" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"
            label = f"{title} {decoding}" if place == 0 else ""
            figures = (name.removeprefix("pass@"), f"{values[name]:.3f}", ends)
            table.add_row(label, *figures, *(own if place == 0 else [""] * len(own)))
    screen.answer(table)
    names = list(dict.fromkeys(name for _, _, values in runs for name in values["experts"]))
    heads = [Text(name, style=COLOURS[place % len(COLOURS)]) for place, name in enumerate(names)]
    shares = Table("share of the tokens that each expert generated", ["benchmark", *heads])
    for title, decoding, values in runs:
        shares.add_row(f"{title} {decoding}", *(f"{values['experts'].get(name, 0.0):.2f}" for name in names))
    screen.answer(shares)
