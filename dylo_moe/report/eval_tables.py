"""The output of an evaluation on a terminal: one example, the progress, and tables of the results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dylo_moe.evaluation.benchmark import Benchmark, Progress
from dylo_moe.evaluation.names import BENCHMARKS
from dylo_moe.evaluation.samples import Completion
from dylo_moe.report.terminal import COLOURS

TITLES = {"humaneval": "HumanEval", "mbpp": "MBPP"}


def show_example(
    console: Console, benchmark: Benchmark, sample: Completion, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print one problem as it is processed: the prompt with its special tokens, the raw answer, and the program."""
    asking = benchmark.asking
    problem = benchmark.problems[sample.task_id]
    prompt = str(tokenizer.decode(asking.ids(problem, tokenizer), clean_up_tokenization_spaces=False))
    stops = ", ".join(map(repr, asking.stops)) or "none"
    console.rule(f"{TITLES[asking.benchmark]}, one example: {sample.task_id}", align="left", style="dim")
    for title, text in (
        (f"prompt ({asking.style})", prompt),
        ("answer, as generated", sample.completion),
        ("program that is judged", sample.solution),
    ):
        console.print(f"[bold]{title}[/bold]", highlight=False)
        console.print(Text(text.rstrip("\n")), soft_wrap=True)
    ended = {"stop": "a stop sequence", "end": "an end token", "length": "max_new_tokens"}[sample.finish]
    console.print(
        Text(f"stop sequences: {stops}; the answer ended at {ended} after {sample.tokens} tokens"), soft_wrap=True
    )
    console.rule(style="dim")


class LiveRate:
    """Shows the progress of a benchmark: as a live line on a terminal, otherwise as one line per batch.

    Args:
        label: the label of the line.
        bar: the live line; None: plain lines are printed.
    """

    def __init__(self, console: Console, label: str, total: int, bar: Bar | None) -> None:
        self.console, self.label, self.bar = console, label, bar
        self.task = None if bar is None else bar.add_task(label, total=total, note="")
        self._last = (-1, False)

    def __call__(self, progress: Progress) -> None:
        """Show the progress; `run_benchmark` calls this."""
        note = describe(progress)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=progress.num_judged, note=note)
            return
        state = (progress.num_generated, progress.num_judged == progress.num_samples)
        if state != self._last:
            self._last = state
            self.console.print(
                f"{self.label}: {progress.num_generated}/{progress.num_samples} answers, {note}",
                highlight=False,
                soft_wrap=True,
            )


@contextmanager
def live_rate(console: Console, label: str, total: int) -> Iterator[LiveRate]:
    """Show the progress of a benchmark while it runs."""
    if not console.is_terminal:
        yield LiveRate(console, label, total, None)
        return
    columns = [TextColumn(label), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()]
    with Bar(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as bar:
        yield LiveRate(console, label, total, bar)


def describe(progress: Progress) -> str:
    """Describe pass@1 so far, the number of timeouts, and the speed."""
    rate = "nothing judged yet"
    if progress.rate is not None:
        late = f", {progress.num_timed_out} timed out" if progress.num_timed_out else ""
        rate = f"pass@1 {progress.rate:.3f} of {progress.num_judged} judged{late}"
    return rate if progress.tokens_per_second is None else f"{rate}, {progress.tokens_per_second:,.0f} tokens/s"


def show_results(console: Console, results: dict[str, Any]) -> None:
    """Print pass@k with intervals, and the experts that generated the answers, for every benchmark in results.json."""
    runs = [
        (TITLES[name], decoding, values)
        for name in BENCHMARKS
        for decoding, values in results.get(name, {}).items()
        if decoding in ("greedy", "sampled")
    ]
    if not runs:
        return
    table = Table(title="pass@k, with 95 % intervals over tasks")
    table.add_column("", no_wrap=True)
    for column in ("k", "pass@k", "interval", "tasks", "timed out", "tokens/s"):
        table.add_column(column, justify="right")
    for title, decoding, values in runs:
        counts = values["counts"]
        own = (values["num_tasks"], counts["timed out"], values["tokens_per_second"])
        for place, (name, interval) in enumerate(values["intervals"].items()):
            ends = "unknown" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"
            table.add_row(
                f"{title} {decoding}" if place == 0 else "",
                *(name.removeprefix("pass@"), f"{values[name]:.3f}", ends),
                *(map(str, own) if place == 0 else ("", "", "")),
            )
    console.print(table)
    shares = Table(title="share of the tokens that each expert generated")
    names = list(dict.fromkeys(name for _, _, values in runs for name in values["experts"]))
    shares.add_column("")
    for place, name in enumerate(names):
        shares.add_column(Text(name, style=COLOURS[place % len(COLOURS)]), justify="right", overflow="fold")
    for title, decoding, values in runs:
        shares.add_row(f"{title} {decoding}", *(f"{values['experts'].get(name, 0.0):.2f}" for name in names))
    console.print(shares)
