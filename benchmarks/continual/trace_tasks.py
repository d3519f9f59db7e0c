"""The seven tasks of TRACE as rows of tokens. See trace.py.

TRACE: Wang et al. 2023, arXiv:2310.06762. The folder has one subfolder a task with `train.jsonl` and `test.jsonl`,
whose lines are `{"prompt": ..., "answer": ...}`. Nothing of it is kept here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from skills import Rows
from transformers import PreTrainedTokenizerBase

TASKS = ("C-STANCE", "FOMC", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
"""In the order in which papers run them."""

OTHER_ORDER = ("20Minuten", "NumGLUE-ds", "ScienceQA", "C-STANCE", "NumGLUE-cm", "Py150", "FOMC")
"""The second order: the arithmetic pair apart, the Chinese task in the middle."""

NEW_TOKENS = dict(zip(TASKS, (4, 4, 48, 4, 8, 8, 100), strict=True))
"""The most tokens of a generated answer; of C-STANCE, FOMC and ScienceQA only the letter counts."""


class Task(NamedTuple):
    """One task: what is trained on, what is asked, and what would be right."""

    name: str
    train: Rows
    test: Rows
    """Prompts with their right answers, to measure losses."""
    prompts: list[list[int]]
    """The test prompts as token ids, cut so that the longest answer still fits."""
    sources: list[str]
    """The test prompts as text, whole."""
    answers: list[str]
    cut: dict[str, int]
    """How many rows were too long, by split."""


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, str]], max_length: int
) -> tuple[Rows, int, list[list[int]]]:
    """Rows of `max_length` tokens, padded on the right, how many were too long, and the prompts' ids.

    A row is prompt, answer, end of text; only the answer and the end are predicted. Of a row that is too long the
    beginning of the prompt is left out, so that the question's end and the answer stay; an answer that is too long by
    itself loses its end and keeps half of the row for the prompt.
    """
    end, num_cut = tokenizer.eos_token_id, 0
    ids = torch.full((len(examples), max_length), end)
    labels, mask, prompts = torch.full_like(ids, -100), torch.zeros_like(ids), []
    for row, example in enumerate(examples):
        prompt = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(example["answer"], add_special_tokens=False)["input_ids"], end]
        num_cut += len(prompt) + len(answer) > max_length
        answer = answer[: max(max_length - len(prompt), max_length // 2)]
        prompt = prompt[-(max_length - len(answer)) :]
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : stop] = torch.tensor(answer)
        mask[row, :stop] = 1
        prompts.append(prompt)
    return Rows(ids, labels, mask), num_cut, prompts


def read_task(
    folder: Path, name: str, tokenizer: PreTrainedTokenizerBase, *, num_train: int, num_test: int, max_length: int
) -> Task:
    """The first rows of a task's files: `num_train` to learn from and at most `num_test` to be judged by.

    The same training rows for all methods and seeds; the seed only shuffles them.
    """
    train, test = (
        [json.loads(line) for line in (folder / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "test")
    )
    if len(train) < num_train:
        raise ValueError(f"{name} has {len(train)} training rows and --rows asks for {num_train}; ask for fewer")
    train, test = train[:num_train], test[:num_test]
    train_rows, train_cut, _ = encode(tokenizer, train, max_length)
    test_rows, test_cut, _ = encode(tokenizer, test, max_length)
    room = max_length - NEW_TOKENS[name]
    prompts = [tokenizer(example["prompt"], add_special_tokens=False)["input_ids"][-room:] for example in test]
    return Task(
        name,
        train_rows,
        test_rows,
        prompts,
        [example["prompt"] for example in test],
        [example["answer"] for example in test],
        {"train": train_cut, "test": test_cut},
    )


def joined(parts: Sequence[Rows]) -> Rows:
    """All rows of several tasks, one task after another."""
    return Rows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def with_replay(tasks: Sequence[Task], place: int, share: float, seed: int) -> Rows:
    """The training rows of the task at `place`, of which `share` is replaced by rows of the tasks before it.

    The replaced rows are drawn without repetition from all earlier tasks together; at least one, so that a small
    share of few rows is not nothing.
    """
    rows = tasks[place].train
    if not place:
        return rows
    generator = random.Random(f"{seed} {place}")
    num_replayed = max(1, round(share * len(rows.input_ids)))
    earlier = joined([task.train for task in tasks[:place]])
    kept = sorted(generator.sample(range(len(rows.input_ids)), len(rows.input_ids) - num_replayed))
    replayed = generator.sample(range(len(earlier.input_ids)), num_replayed)
    return joined([rows.take(torch.tensor(kept)), earlier.take(torch.tensor(replayed))])
