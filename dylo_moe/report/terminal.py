"""The output of a run on a terminal: tables of the data and the results, and samples coloured by expert."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.loading import DatasetCounts, LoadedData
from dylo_moe.data.mixing import Share
from dylo_moe.data.tokenized import Reason
from dylo_moe.evaluation.continuation import RoutedText
from dylo_moe.model.loss import chunk_loss
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.routing.config import BASE
from dylo_moe.training.alarms import DEAD_SHARE, dead_experts
from dylo_moe.training.metrics import MeterReading

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow")

COUNT_TITLES = {
    "documents": "documents",
    "left_out": "left out",
    "read": "read",
    "train": "train",
    "evaluation": "held out",
    "unused": "not used",
    "cut_prompt": "prompt cut",
    "cut_response": "response cut",
    "too_long": "too long",
    "empty": "empty",
    "malformed": "malformed",
    "duplicates": "duplicate",
    "duplicates_across": "in another dataset",
    "held_out": "question held out",
    "contaminated": "contaminated",
}

MAX_REASONS = 8
"""The most reasons shown for one dataset; the others are counted."""


def show_data(console: Console, data: LoadedData) -> None:
    """Print how every row was used or why it was left out, and what an epoch consists of."""
    show_counts(console, data.counts)
    for name, origin in data.origins.items():
        console.print(Text(f"{name}: {origin}", style="dim"), soft_wrap=True)
    for name, reasons in data.reasons.items():
        show_reasons(console, name, reasons)
    show_mixture(console, data.shares)
    for note in data.notes:
        console.print(Text(f"Note: {note}", style="yellow"))


def show_counts(console: Console, counts: Sequence[DatasetCounts]) -> None:
    """Print the counts of rows with a column for each dataset; a line that is zero everywhere is left out."""
    table = Table(title="rows read, and how they were used", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for count in counts:
        table.add_column(count.name, justify="right", overflow="fold")
    for field, title in COUNT_TITLES.items():
        values = [getattr(count, field) for count in counts]
        if field in ("train", "evaluation") or any(values):
            table.add_row(title, *(f"{value:,}" for value in values))
    console.print(table)


def show_reasons(console: Console, name: str, reasons: Sequence[Reason]) -> None:
    """Print why rows of a dataset were left out or changed."""
    for reason in reasons[:MAX_REASONS]:
        console.print(Text(f"{name}: {reason.num_rows:,} x {reason.text} (first: {reason.first})"), soft_wrap=True)
    if len(reasons) > MAX_REASONS:
        rest = sum(reason.num_rows for reason in reasons[MAX_REASONS:])
        console.print(f"{name}: {rest:,} more rows with {len(reasons) - MAX_REASONS:,} other reasons", highlight=False)


def show_mixture(console: Console, shares: Sequence[Share]) -> None:
    """Print the share that each dataset has in an epoch."""
    table = Table(title="one epoch, in rows and in trained tokens")
    for column in ("dataset", "rows", "share", "tokens", "share", "passes"):
        table.add_column(column, justify="left" if column == "dataset" else "right", overflow="fold")
    for share in shares:
        cells = f"{share.rows:,}", f"{share.share:.1%}", f"{share.tokens:,}", f"{share.token_share:.1%}"
        table.add_row(share.name, *cells, f"{share.passes:.2f}")
    console.print(table)


def show_losses(console: Console, before: dict[str, float], after: dict[str, MeterReading]) -> None:
    """Print the held-out loss of each dataset before and after training."""
    table = Table(title="held-out loss, nats per token")
    for column in ("dataset", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    for domain, reading in after.items():
        change = reading.loss - before[domain]
        colour = "green" if change < 0 else "red"
        table.add_row(domain, f"{before[domain]:.3f}", f"{reading.loss:.3f}", Text(f"{change:+.3f}", style=colour))
    console.print(table)


def show_shares(console: Console, readings: dict[str, MeterReading]) -> None:
    """Print the share of each dataset's held-out tokens that went to each expert."""
    table = Table(title="share of the held-out tokens sent to each expert")
    table.add_column("expert")
    for domain in readings:
        table.add_column(domain, justify="right", overflow="fold")
    experts = list(next(iter(readings.values())).shares)
    for index, expert in enumerate(experts):
        cells = []
        for reading in readings.values():
            share = reading.shares[expert]
            cells.append(Text(f"{share:.2f}", style="bold" if share >= 0.5 else "dim" if share < 0.05 else ""))
        table.add_row(Text(expert, style=COLOURS[index % len(COLOURS)]), *cells)
    entropies = [
        ("router entropy, per token", [f"{reading.token_entropy:.2f}" for reading in readings.values()]),
        ("router entropy, of the average", [f"{reading.average_entropy:.2f}" for reading in readings.values()]),
    ]
    table.add_section()
    for label, cells_ in entropies:
        table.add_row(Text(label, style="dim"), *cells_)
    console.print(table)
    dead = dead_experts(readings)
    if dead:
        console.print(
            f"[red]dead: {', '.join(dead)}[/red] (under {DEAD_SHARE:.0%} of every dataset); "
            "raise --balance_coefficient or use fewer experts"
        )
    else:
        console.print("No expert is dead.")


def show_sample(
    console: Console, sample: RoutedText, tokenizer: PreTrainedTokenizerBase, experts: Sequence[str]
) -> None:
    """Print a text with each token in the colour of its expert; without colours, each change of expert is written
    out."""
    styles: dict[str | None, str] = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(experts)}
    text, last = Text(), None
    for position, (token, expert) in enumerate(zip(sample.ids, sample.experts, strict=True)):
        if position == sample.prompt_length:
            text.append(" » ", style="bold")
        name = expert or BASE
        if not console.is_terminal and not console.record and name != last:
            text.append(f"⟨{name}⟩")
        last = name
        dim = " dim" if position < sample.prompt_length else ""
        text.append(str(tokenizer.decode([token])), style=styles.get(expert, "white") + dim)
    console.rule(sample.domain, align="left", style="dim")
    console.print(text, highlight=False)


def show_legend(console: Console, experts: Sequence[str]) -> None:
    """Print which colour stands for which expert."""
    legend = Text("tokens by expert: ")
    for index, name in enumerate(experts):
        legend.append(f"{name}  ", style=COLOURS[index % len(COLOURS)])
    legend.append("(the prompt is dim; the model continues after »)", style="dim")
    console.print(legend)


def show_loss(console: Console, model: DyLoRAMoE, wanted: int | None) -> None:
    """Choose how the loss is computed, and print it."""
    text = chunk_loss(model, wanted)
    if text:
        console.print(text, highlight=False, markup=False)
