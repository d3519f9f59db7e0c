"""What the novelty detector makes of TRACE's tasks, labelled and unlabelled, and of data that comes again.

    python benchmarks/continual/trace_detector.py FOLDER [--chunks 25 50 100] [--max_seq_length 512]

FOLDER holds a folder for each task (Wang et al. 2023, arXiv:2310.06762) with train.jsonl and test.jsonl of `prompt` and
`answer`. A decision follows from the frozen base alone, so nothing is trained: the model's own `add_skill` is called as
`dylora stream` calls it, in the order of the field and in the reverse one.

Labelled: a table of each stage's decision. Then every task's held-out batches are judged after every stage: those of a
task that was not learned yet must be new (else a miss), those of a learned one known (else a false alarm).
Unlabelled: all training rows as one stream, cut where the detector finds a change and into chunks, then the same rows
once more.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.commands.stream.data import chunks
from dylo_moe.continual.base_texts import write_texts
from dylo_moe.continual.change_points import change_points
from dylo_moe.data.collator import Collator
from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data

TASKS = ("C-STANCE", "FOMC", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
SKILL_EXAMPLES = 512
"""The rows of a stage that are read at most, as in `dylora stream`."""

Row = tuple[str, dict]
"""A task and a tokenised row of it."""


class Chunk(NamedTuple):
    """Some rows of an unlabelled stream."""

    rows: list[Row]
    is_again: bool
    """Whether it is of the second pass."""

    @property
    def tasks(self) -> Counter[str]:
        """The number of its rows of each task."""
        return Counter(task for task, _ in self.rows)


def batches_of(rows: Sequence[dict], collator: Collator) -> Iterator[dict[str, Tensor]]:
    """Batches as the model reads them."""
    for start in range(0, len(rows), 16):
        yield collator(list(rows[start : start + 16]))


def read_rows(folder: Path, model: str, length: int) -> tuple[Dataset, Dataset]:
    """The training rows of a task as a stream would learn them, and rows that it never sees."""
    tokenizer = load_tokenizer(model)
    train, test = (
        load_data(DataConfig(datasets=[str(folder / f"{part}.jsonl")], max_seq_length=length), tokenizer, seed=42)
        for part in ("train", "test")
    )
    return train.train, concatenate_datasets([*train.evaluation.values(), test.train, *test.evaluation.values()])


def new_model(name: str, base_text: Tensor | None) -> DyLoRAMoE:
    """An empty pool that grows; the base's own text is written once for all."""
    model = DyLoRAMoE.from_base(load_base(name), allow_expert_growth=True)
    if base_text is not None:
        model.know_base([{"input_ids": base_text}], seed=42)
    return model


def labelled(model: DyLoRAMoE, order: Sequence[str], rows: dict, collator: Collator, sizes: Sequence[int]) -> None:
    """Print each stage's decision, and how held-out batches are judged on the way."""
    tests = {task: model.text_features(batches_of(list(rows[task][1]), collator)) for task in order}
    misses, alarms, wrong = (Counter() for _ in range(3))
    of_new, of_known = Counter(), Counter()
    pair: list[str] = []
    print("\n| stage | judged | score | threshold | nearest |\n|---|---|---|---|---|")
    for place, task in enumerate(order):
        for other in order[place:]:
            for size in sizes if place else ():
                for batch in cut(tests[other], size):
                    of_new[size] += 1
                    judged = model.growth.judge(batch)
                    misses[size] += not judged.novel
                    if not judged.novel:
                        pair.append(f"{other} taken for {judged.nearest}")
        sample = list(rows[task][0].select(range(min(SKILL_EXAMPLES, len(rows[task][0])))))
        told = model.add_skill(task, batches_of(sample, collator), seed=42 + place)
        score = ["", ""] if told.score is None else [f"{told.score:.2f}", f"{told.threshold:.2f}"]
        what = "new" if told.novel else "known"
        print(f"| {place + 1} {task} | {what} | {score[0]} | {score[1]} | {told.nearest or ''} |", flush=True)
        for known in order[: place + 1]:
            for size in sizes:
                for batch in cut(tests[known], size):
                    of_known[size] += 1
                    judged = model.growth.judge(batch)
                    alarms[size] += judged.novel
                    wrong[size] += judged.nearest != known
    print("\n| held-out batch | new, missed | known, false alarms | known, nearest another task |\n|---|---|---|---|")
    for size in sizes:
        new, known = of_new[size], of_known[size]
        print(f"| {size} | {misses[size]} of {new} | {alarms[size]} of {known} | {wrong[size]} of {known} |")
    if pair:
        print("missed: " + ", ".join(f"{name} ({count})" for name, count in Counter(pair).most_common()), flush=True)


def cut(texts: Sequence[Tensor], size: int) -> list[list[Tensor]]:
    """Whole batches of texts, one after another."""
    return [list(texts[start : start + size]) for start in range(0, len(texts) - size + 1, size)]


def chunks_of(everything: Sequence[Row], changes: Sequence[int], size: int) -> list[Chunk]:
    """The stream of all tasks in chunks of so many rows, then the same once more; a chunk ends before each change."""
    once = [list(everything[start:end]) for start, end in chunks(len(everything), changes, size)]
    return [Chunk(part, is_again) for is_again in (False, True) for part in once]


def unlabelled(model: DyLoRAMoE, order: Sequence[str], rows: dict, collator: Collator, size: int, cuts: bool) -> None:
    """Print which experts each task's rows went to, and every chunk that grew an expert or straddles two tasks."""
    decisions = []
    everything = [(task, row) for task in order for row in rows[task][0]]
    changes = []
    if cuts:
        texts = model.text_features(batches_of([row for _, row in everything], collator))
        changes = change_points(torch.stack([text.mean(0) for text in texts]))
    for number, chunk in enumerate(chunks_of(everything, changes, size)):
        sample = [row for _, row in chunk.rows[:SKILL_EXAMPLES]]
        name = f"skill_{len(model.experts) + 1}"
        decisions.append((number, chunk, model.add_skill(name, batches_of(sample, collator), seed=42 + number)))
    taken: dict[str, Counter[str]] = {}  # rows of each task by expert, in the first pass
    for _, chunk, told in decisions:
        if not chunk.is_again:
            taken.setdefault(told.expert, Counter()).update(chunk.tasks)
    task_of = {expert: tasks.most_common(1)[0][0] for expert, tasks in taken.items()}
    borders = list(accumulate(len(rows[task][0]) for task in order))[:-1]
    print(f"\nchunks of {size}; tasks begin at {borders}, changes found: {changes}\n")
    print("| task | experts mostly of it | its rows in them | again: its chunks, false alarms |")
    print("|---|---|---|---|")
    for task in order:
        own = [expert for expert in task_of if task_of[expert] == task]
        share = sum(taken[expert][task] for expert in own) / sum(tasks[task] for tasks in taken.values())
        again = [told for _, chunk, told in decisions if chunk.is_again and set(chunk.tasks) == {task}]
        print(f"| {task} | {len(own)} | {share:.2f} | {sum(told.novel for told in again)} of {len(again)} |")
    mixed = [told.novel for _, chunk, told in decisions if len(chunk.tasks) > 1 and not chunk.is_again]
    print(f"{len(model.experts)} experts; of {len(mixed)} chunks of two tasks {sum(mixed)} were judged new, first pass")
    for number, chunk, told in decisions:
        if told.novel or len(chunk.tasks) > 1:
            mixture = " + ".join(f"{count} {task}" for task, count in chunk.tasks.items())
            why = "" if told.score is None else f", {told.score:.2f} from {told.nearest}, at most {told.threshold:.2f}"
            print(f"{number + 1}{' again' if chunk.is_again else ''}: {mixture}: {told.action} {told.expert}{why}")


def main() -> None:
    """Read the command line, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--chunks", type=int, nargs="*", default=[25, 50, 100])
    parser.add_argument("--max_seq_length", type=int, default=512)
    parser.add_argument("--no_cuts", action="store_true", help="chunks of fixed length, as before changes were found")
    parser.add_argument("--orders", nargs="*", default=["field", "reverse"], choices=["field", "reverse"])
    asked = parser.parse_args()
    collator = Collator(load_tokenizer(asked.model))
    rows = {task: read_rows(asked.folder / task, asked.model, asked.max_seq_length) for task in TASKS}
    base_text = write_texts(load_base(asked.model), seed=42)
    for name in asked.orders:
        order = TASKS if name == "field" else TASKS[::-1]
        print(f"\n## {name} order: {', '.join(order)}")
        labelled(new_model(asked.model, base_text), order, rows, collator, asked.chunks)
        for size in asked.chunks:
            unlabelled(new_model(asked.model, base_text), order, rows, collator, size, not asked.no_cuts)


if __name__ == "__main__":
    main()
