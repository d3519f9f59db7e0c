"""The commands `dylora data list`, `show` and `check`, which inspect data before it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from rich.console import Group
from rich.padding import Padding
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.commands.data.arguments import LookArguments
from dylo_moe.data.config import DataConfig
from dylo_moe.data.contamination import load_benchmarks
from dylo_moe.data.encoding import IGNORED, text_format
from dylo_moe.data.loading import LoadedData, load_data
from dylo_moe.data.packing import PackedTexts, padding_share
from dylo_moe.data.sources.catalog import CATALOG
from dylo_moe.data.sources.examples import Fate
from dylo_moe.data.sources.locate import locate_all, locate_for_training
from dylo_moe.data.sources.read import SourceRows, read_dataset
from dylo_moe.data.tokenized import TokenizedDataset as Rows
from dylo_moe.data.tokenized import tokenise_all
from dylo_moe.report.terminal import reason_in_words, show_data, show_reasons
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table
from dylo_moe.utils.words import counted

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)

PROMPT_STYLE, TRAINED_STYLE, SPECIAL_STYLE = "dim", "green", "bold black on yellow"

TRAINED_SPECIAL_STYLE = "bold black on green"
"""Styles of tokens."""

MAX_OVERLAPS = 5
"""The most overlaps that are listed for one dataset."""


def list_datasets() -> None:
    """Print every dataset of the catalog."""
    screen = Screen("data", is_answer=True)
    for source in CATALOG.values():
        licence = Text(source.licence, style="red" if source.non_commercial else "")
        licence.append(", not for commercial use" if source.non_commercial else "")
        facts = Text(f"{source.size} · {source.format} · ").append_text(licence)
        if not source.for_training:
            facts.append(" · never trained on", style="yellow")
        origin = source.origin
        if source.revision is not None:
            origin += f"{':' + source.config if source.config else ''} at {source.revision[:10]}"
        screen.say(source.name, style="bold")
        screen.say(Padding(Group(Text(source.description), facts, Text(origin, "dim")), (0, 0, 0, 4)))
    screen.say(
        "\nDatasets of the hub are read from there, or from --data_dir FOLDER, which has a folder for each name. The "
        "path of a file or folder, or a hub id, names a dataset too. docs/datasets.md has more.",
    )


def show_dataset(config: DataConfig, look: LookArguments) -> None:
    """Print examples of one dataset as the model will see them."""
    screen = Screen("data", is_answer=True)
    (place,) = locate_all(config)
    reading = read_dataset(place, config)
    tokenizer = load_tokenizer(look.model)
    (rows,) = tokenise_all([reading], text_format(tokenizer), config, None)
    good = np.flatnonzero(rows.good)
    chosen = np.sort(np.random.default_rng(look.seed).permutation(good)[: look.examples])
    _show_head(screen, reading, rows, len(good))
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    for position in chosen.tolist():
        row = rows.rows[position]
        title = f"row {position} · {counted(row['length'], 'token')}, {row['trained']} trained"
        if row["cut"]:
            title += f" · cut from {row['whole_length']}"
        screen.rule(title)
        text = coloured(row["input_ids"], row["labels"], tokenizer, special, marked=not screen.has_colours)
        screen.say(text)
    screen.rule()
    show_reasons(screen, reading.name, rows.reasons())
    if unread := rows.unread_in_words():
        screen.note(unread)


def _show_head(screen: Screen, reading: SourceRows, rows: Rows, num_good: int) -> None:
    source = reading.source
    licence = f", licence {source.licence}" if source is not None else ""
    screen.say(
        f"{reading.name} ({reading.origin}{licence}): {counted(len(rows.rows), 'row')} read, {num_good:,} usable",
    )
    if source is not None and not source.for_training:
        screen.warn("For evaluation only: dylora train refuses it.")
    legend = Text("tokens: ")
    legend.append("prompt", PROMPT_STYLE).append("  ").append("trained", TRAINED_STYLE).append("  ")
    legend.append("template", SPECIAL_STYLE).append("  ").append("end token, trained", TRAINED_SPECIAL_STYLE)
    if not screen.has_colours:
        legend = Text("⟦...⟧: trained; the rest is the prompt")
    screen.say(legend)


def coloured(
    ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase, special: set[int], *, marked: bool
) -> Text:
    """The text of a row, with its prompt, trained and special tokens in different styles.

    Args:
        special: the ids of special tokens, such as the template's and the end token; their text is shown too.
        marked: whether trained tokens are also enclosed in ⟦ and ⟧, for output without colours.
    """
    text = Text()
    # No token precedes the first one to predict it from, so the first token of a plain text is not trained.
    kinds = [
        (place > 0 and label != IGNORED, index in special)
        for place, (index, label) in enumerate(zip(ids, labels, strict=True))
    ]
    styles = {
        (False, False): PROMPT_STYLE,
        (True, False): TRAINED_STYLE,
        (False, True): SPECIAL_STYLE,
        (True, True): TRAINED_SPECIAL_STYLE,
    }
    was_trained = False
    for (trained, is_special), group in groupby(zip(kinds, ids, strict=True), key=lambda item: item[0]):
        if marked and trained != was_trained:
            text.append("⟦" if trained else "⟧")
        was_trained = trained
        part = tokenizer.decode([index for _, index in group], clean_up_tokenization_spaces=False)
        text.append(str(part), styles[trained, is_special])
    if marked and was_trained:
        text.append("⟧")
    return text


def check_datasets(config: DataConfig, look: LookArguments) -> None:
    """Print what training on these datasets would use: rows, lengths, padding, and overlap with benchmarks."""
    screen = Screen("data", is_answer=True)
    locate_for_training(config)  # a wrong name is told before the tokenizer, which may be missing too
    tokenizer = load_tokenizer(look.model)
    data = load_data(config, tokenizer, seed=look.seed)
    show_data(screen, data)
    form = text_format(tokenizer)
    _show_lengths(screen, tokenise_all(data.readings, form, config, None), config)
    _show_padding(screen, data, config, look.per_device_train_batch_size)
    benchmarks, missing = load_benchmarks(config)
    for name, reason in missing.items():
        screen.warn(f"Overlap with {name}: not checked. {reason}")
    if benchmarks.problems:
        rows = tokenise_all(data.readings, form, config, benchmarks)
        _show_overlaps(screen, rows, len(benchmarks.problems), benchmarks.unfindable, removed=config.decontaminate)


def _show_lengths(screen: Screen, tables: Sequence[Rows], config: DataConfig) -> None:
    """Print quantiles of the rows' lengths in tokens, before long rows are cut."""
    heads = ["longest" if quantile == 1 else f"{quantile:.0%}" for quantile in QUANTILES]
    columns = ["dataset", *heads, f"over {config.max_seq_length}"]
    table = Table("tokens of a row, before anything is cut", columns)
    for rows in tables:
        lengths = rows.whole_lengths[rows.whole_lengths > 0]
        cells = [f"{value:,.0f}" for value in np.quantile(lengths, QUANTILES)]
        table.add_row(rows.name, *cells, f"{(lengths > config.max_seq_length).mean():.1%}")
    screen.say(table)


def _show_padding(screen: Screen, data: LoadedData, config: DataConfig, batch_size: int) -> None:
    packed = PackedTexts(data.train, config.max_seq_length)
    screen.say(
        f"In batches of {batch_size}, {padding_share(packed.lengths, batch_size):.1%} of the tokens are padding; with "
        f"--packing, {1 - packed.fill:.1%}, in {counted(len(packed), 'row')} instead of {len(packed.lengths):,}.",
    )


def _show_overlaps(
    screen: Screen, tables: Sequence[Rows], num_problems: int, unfindable: int, *, removed: bool
) -> None:
    """Print how many rows overlap with a benchmark, and which problems they overlap with."""
    done = ", removed" if removed else ", kept; --decontaminate removes them"
    short = f" ({unfindable} of them too short to be found)" if unfindable else ""
    total = sum(rows.num(Fate.CONTAMINATED) for rows in tables)
    rows = counted(total, "row") + done if total else "none"
    screen.say(f"Overlap with {counted(num_problems, 'test problem')}{short}: {rows}.")
    for table in tables:
        found = [reason for reason in table.reasons() if reason.text.startswith("it overlaps with")]
        for reason in found[:MAX_OVERLAPS]:
            screen.say(f"  {table.name}: {reason_in_words(reason)}")
        if len(found) > MAX_OVERLAPS:
            screen.say(f"  {table.name}: and with {counted(len(found) - MAX_OVERLAPS, 'more problem')}")
