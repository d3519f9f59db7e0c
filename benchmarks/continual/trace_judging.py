"""How every method of trace.py is judged: generated answers, and nats per answer token. See trace.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from continual_baselines import BATCH_ROWS, trimmed
from skills import Rows
from trace_metrics import score
from trace_tasks import NEW_TOKENS, Task
from transformers import PreTrainedTokenizerBase

GENERATED_ROWS = 25
"""Prompts that are continued at once."""

Stage = dict[str, Any]
"""What one stage leaves in its file."""


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Rows in groups of alike length, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    yield from (order[first : first + size] for first in range(0, len(order), size))


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    num_new: int,
    *,
    experts: Sequence[str | None] | None = None,
) -> list[str]:
    """Greedy continuations of the prompts, padded on the left, cached, up to the end of text or `num_new` tokens.

    Args:
        experts: the expert that each prompt is sent to, None for the base; without it the model itself decides.
    """
    model.eval()
    texts = [""] * len(prompts)
    for rows in by_length([len(prompt) for prompt in prompts], GENERATED_ROWS):
        longest = max(len(prompts[row]) for row in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, longest - len(prompts[row]) :] = torch.tensor(prompts[row])
            mask[place, longest - len(prompts[row]) :] = 1
        with nullcontext() if experts is None else model.route_to([experts[row] for row in rows]):
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=num_new,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        for row, text in zip(rows, tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True), strict=True):
            texts[row] = text
    return texts


@torch.no_grad()
def row_losses(model: Any, rows: Rows, *, experts: Sequence[str | None] | None = None) -> list[float]:
    """Summed nats of each row's answer.

    Args:
        experts: as for `answers`.
    """
    model.eval()
    sums = [0.0] * len(rows.input_ids)
    for group in by_length(rows.attention_mask.sum(1).tolist(), BATCH_ROWS):
        batch = trimmed(rows.take(torch.tensor(group)))
        with nullcontext() if experts is None else model.route_to([experts[row] for row in group]):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        for place, row in enumerate(group):
            labels = batch.labels[place, 1:]
            predicted = labels != -100
            wrong = F.cross_entropy(logits[place, :-1][predicted].float(), labels[predicted], reduction="sum")
            sums[row] = float(wrong)
    return sums


def per_token(sums: Sequence[float], task: Task) -> float:
    """Nats per answer token (the end of text is one) of the first rows, from their sums."""
    return sum(sums) / int((task.test.labels[: len(sums), 1:] != -100).sum())


class Judge:
    """Measures a model on tasks.

    Args:
        tasks: all of them.
        num_matrix_rows: test rows of each task that a loss is measured on, after every stage.
    """

    def __init__(self, tasks: dict[str, Task], tokenizer: PreTrainedTokenizerBase, *, num_matrix_rows: int) -> None:
        self.tasks, self.tokenizer, self.num_matrix_rows = tasks, tokenizer, num_matrix_rows

    def matrix_rows(self, name: str) -> Rows:
        """The rows of a task that losses are measured on."""
        return self.tasks[name].test.take(slice(0, self.num_matrix_rows))

    def points(self, name: str, outputs: Sequence[str]) -> float:
        """The task's own metric."""
        return score(name, self.tasks[name].sources, outputs, self.tasks[name].answers)

    def stage(self, model: Any, names: Sequence[str]) -> Stage:
        """Answers and points of some tasks, and nats per answer token of all."""
        outputs = {n: answers(model, self.tokenizer, self.tasks[n].prompts, NEW_TOKENS[n]) for n in names}
        return {
            "points": {name: self.points(name, found) for name, found in outputs.items()},
            "losses": {n: per_token(row_losses(model, self.matrix_rows(n)), task) for n, task in self.tasks.items()},
            "outputs": outputs,
        }
