"""The output of a run on a terminal: tables of the data and the results, and samples coloured by expert."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dylo_moe.data.loading import DatasetCounts, LoadedData
from dylo_moe.data.mixing import Share
from dylo_moe.data.tokenized import Reason
from dylo_moe.evaluation.continuation import RoutedText
from dylo_moe.model.loss import chunk_loss
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.report.turns import Answer, turns_in_words
from dylo_moe.routing.config import BASE, RESPONSE, SEQUENCE, TOKEN
from dylo_moe.training.alarms import DEAD_SHARE, dead_experts
from dylo_moe.training.metrics import MeterReading
from dylo_moe.training.precision import bf16_over_fp32
from dylo_moe.training.trainer_arguments import TrainArguments
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table
from dylo_moe.utils.words import counted

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow")

COUNT_TITLES = {
    "documents": "documents",
    "left_out": "left out",
    "read": "read",
    "train": "train",
    "evaluation": "held out",
    "search": "for the search",
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


def show_device(screen: Screen, train: TrainArguments) -> None:
    """Print that a training runs on the CPU because there is no GPU, and where bf16 makes it slower."""
    if train.device.type != "cpu":
        return
    if not train.use_cpu:
        screen.say("there is no GPU here: training on the CPU")
    if not train.bf16:
        return
    ratio = bf16_over_fp32()
    if ratio > 1.2:
        screen.warn(
            f"a product in bf16 takes {ratio:.1f} times as long as in fp32 on this CPU: without --bf16 a base that is "
            "stored in fp32 trains faster, and takes more memory"
        )


def show_data(screen: Screen, data: LoadedData) -> None:
    """Print how every row was used or why it was left out, and what an epoch consists of."""
    show_rows(screen, data)
    show_mixture(screen, data.shares)
    for note in data.notes:
        screen.note(note)


def show_rows(screen: Screen, data: LoadedData) -> None:
    """Print how every row was used or why it was left out, and where each dataset was found."""
    show_counts(screen, data.counts)
    for name, origin in data.origins.items():
        screen.say(f"{name}: {origin}", style="dim")
    for name, reasons in data.reasons.items():
        show_reasons(screen, name, reasons)


def show_counts(screen: Screen, counts: Sequence[DatasetCounts]) -> None:
    """Print the counts of rows with a column for each dataset; a line that is zero everywhere is left out."""
    table = Table("rows read, and how they were used", ["rows", *(count.name for count in counts)])
    for field, title in COUNT_TITLES.items():
        values = [getattr(count, field) for count in counts]
        if field in ("train", "evaluation") or any(values):
            table.add_row(title, *(f"{value:,}" for value in values))
    screen.say(table)


def show_reasons(screen: Screen, name: str, reasons: Sequence[Reason]) -> None:
    """Print why rows of a dataset were left out or changed."""
    for reason in reasons[:MAX_REASONS]:
        screen.say(f"{name}: {reason_in_words(reason)}")
    if len(reasons) > MAX_REASONS:
        rest = counted(sum(reason.num_rows for reason in reasons[MAX_REASONS:]), "more row")
        screen.say(f"{name}: {rest} with {counted(len(reasons) - MAX_REASONS, 'other reason')}")


def reason_in_words(reason: Reason) -> str:
    """Say how many rows were left out or changed, why, and where the first of them is."""
    return f"{reason.num_rows:,} x {reason.text} (first: {reason.first})"


def show_mixture(screen: Screen, shares: Sequence[Share]) -> None:
    """Print the share that each dataset has in an epoch."""
    columns = ["dataset", "rows", "share", "tokens", "share", "passes"]
    table = Table("one epoch, in rows and in trained tokens", columns)
    for share in shares:
        cells = f"{share.rows:,}", f"{share.share:.1%}", f"{share.tokens:,}", f"{share.token_share:.1%}"
        table.add_row(share.name, *cells, f"{share.passes:.2f}")
    screen.say(table)


def show_losses(screen: Screen, before: dict[str, float], after: dict[str, MeterReading]) -> None:
    """Print the held-out loss of each dataset before and after training."""
    table = Table("held-out loss, nats per token", ["dataset", "before", "after", "change"])
    for domain, reading in after.items():
        change = reading.loss - before[domain]
        colour = "green" if change < 0 else "red"
        table.add_row(domain, f"{before[domain]:.3f}", f"{reading.loss:.3f}", Text(f"{change:+.3f}", style=colour))
    screen.say(table)


def show_shares(screen: Screen, readings: dict[str, MeterReading]) -> None:
    """Print the share of each dataset's held-out tokens that went to each expert."""
    are_all = all(reading.num_routed == reading.num_tokens for reading in readings.values())
    what = "held-out tokens" if are_all else "tokens of held-out answers"
    table = Table(f"share of the {what} sent to each expert", ["expert", *readings])
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
    screen.say(table)
    dead = dead_experts(readings)
    if not any(reading.num_routed for reading in readings.values()):
        screen.warn("no held-out row holds an answer, so that the unchanged base read all of them")
    elif dead:
        screen.warn(
            f"dead: {', '.join(dead)} (under {DEAD_SHARE:.0%} of every dataset); raise --balance_coefficient or use "
            "fewer experts"
        )
    else:
        screen.say("No expert is dead.")


def show_sample(screen: Screen, sample: RoutedText, tokenizer: PreTrainedTokenizerBase, experts: Sequence[str]) -> None:
    """Print a text with each token in the colour of its expert; without colours, each change of expert is written
    out. Where routing is decided once for each answer, a line behind the text says who wrote it."""
    styles: dict[str | None, str] = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(experts)}
    text, last = Text(), None
    for position, (token, expert) in enumerate(zip(sample.ids, sample.experts, strict=True)):
        if position == sample.prompt_length:
            text.append(" » ", style="bold")
        name = expert or BASE
        if not screen.has_colours and name != last:
            text.append(f"⟨{name}⟩")
        last = name
        dim = " dim" if position < sample.prompt_length else ""
        text.append(str(tokenizer.decode([token])), style=styles.get(expert, "white") + dim)
    screen.rule(sample.domain)
    screen.say(text)
    if sample.turns is not None:
        answers = [Answer(turn.stop - turn.start, turn.experts) for turn in sample.turns]
        for line in turns_in_words(answers, num_tokens=len(sample.ids)):
            screen.say(line)


def show_legend(screen: Screen, experts: Sequence[str]) -> None:
    """Print which colour stands for which expert; without colours, how an expert is named."""
    if not screen.has_colours:
        screen.say("⟨EXPERT⟩ stands before the tokens that it processed; the model continues after »")
        return
    legend = Text("tokens by expert: ")
    for index, name in enumerate(experts):
        legend.append(f"{name}  ", style=COLOURS[index % len(COLOURS)])
    legend.append("(the prompt is dim; the model continues after »)", style="dim")
    screen.say(legend)


ROUTED = {
    TOKEN: "each token on its own",
    SEQUENCE: "each text as a whole, by its prompt",
    RESPONSE: "each answer as a whole, by its prompt, which the base reads",
}


def show_routing(screen: Screen, model: DyLoRAMoE) -> None:
    """Print what is routed as a whole."""
    granularity = model.router_config.granularity
    screen.say(f"routed: {ROUTED[granularity]} (granularity {granularity})")


def show_loss(screen: Screen, model: DyLoRAMoE, wanted: int | None) -> None:
    """Choose how the loss is computed, and print it."""
    text = chunk_loss(model, wanted)
    if text:
        screen.say(text)
