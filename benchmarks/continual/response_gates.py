"""Which gate, read once at the end of a prompt, tells skills apart best?

    python benchmarks/continual/response_gates.py --data FOLDER [--layers embeddings 8 15] [--half_lives 8 32 128 inf]
        [--shrinkages 0.05 0.2] [--train_rows 96] [--drop_end 40]

FOLDER holds a folder for each of seven tasks of TRACE (Wang et al. 2023, arXiv:2310.06762) with train.jsonl and
test.jsonl of `prompt` and `answer`. A gate that decides once for an answer reads one vector of a prompt: the router's
features at the first token of the name in the answer's header (`assistant`). Every gate here is the linear
discriminant with one shared covariance (Fisher 1936), computed in closed form from training prompts and judged by the
test prompts of all tasks together; the gates differ in what their means and their covariance are taken of:

  now         means and covariance of all tokens of the training rows, answers too, as `SkillLibrary` does
  prompts     both of all tokens of the prompts
  ends        means of the prompts' ends, covariance of all tokens of the prompts
  late ends   means of the prompts' ends, covariance of the last 16 tokens of each prompt
  only ends   means and covariance of the prompts' ends: one vector a prompt

Printed is the share of test prompts that reach their own task, over tasks: mean / worst; once as first turns, and once
as second turns of conversations whose first turn is of another task. Many tasks end their prompts with a fixed line
("Answer:"); `--drop_end 40` leaves such lines out, of training and of test prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from trace_tasks import TASKS
from transformers import PreTrainedModel

from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.data.encoding import IGNORED, TextFormat, encode_batch, text_format
from dylo_moe.data.sources.examples import Example, RowError, ask
from dylo_moe.routing.config import EMBEDDINGS, parse_router_layer
from dylo_moe.routing.features import causal_exponential_mean

AFTER = 2
"""Tokens of a prompt's end that the decision does not see: what follows the first token of `assistant`."""

LATE = 16
"""Tokens of a prompt's end that the covariance of `late ends` is taken of."""

BATCH_ROWS = 8

Place = tuple[str | int, float]
"""The layer that the router reads, and the half-life of its mean."""


class Row(NamedTuple):
    """One exchange."""

    ids: list[int]
    prompt_length: int


class Moments(NamedTuple):
    """Count, sum and sum of outer products of some vectors, fp64."""

    count: int
    sum_D: Tensor
    outer_DD: Tensor

    @classmethod
    def of(cls, vectors_ND: Tensor) -> Moments:
        """Of the rows of a matrix."""
        return cls(len(vectors_ND), vectors_ND.double().sum(0), (vectors_ND.T @ vectors_ND).double())

    def plus(self, other: Moments) -> Moments:
        """Of the vectors of both."""
        return Moments(self.count + other.count, self.sum_D + other.sum_D, self.outer_DD + other.outer_DD)

    @property
    def mean_D(self) -> Tensor:
        """The vectors' mean."""
        return self.sum_D / self.count

    @property
    def scatter_DD(self) -> Tensor:
        """The sum of outer products of the differences from the mean."""
        return self.outer_DD - self.count * torch.outer(self.mean_D, self.mean_D)


class Read(NamedTuple):
    """What is read of some rows of a task at one place."""

    ends_ND: Tensor
    """The features that a decision sees, fp32, one vector a prompt."""
    rows: Moments
    prompts: Moments
    late: Moments


GATES = {
    "now": ("rows", "rows"),
    "prompts": ("prompts", "prompts"),
    "ends": ("ends", "prompts"),
    "late ends": ("ends", "late"),
    "only ends": ("ends", "ends"),
}
"""What the means and the covariance of each gate are taken of."""


def read_exchanges(path: Path, count: int, *, drop_end: int) -> list[Example]:
    """The first exchanges of a file, each without so many characters at its prompt's end, and at most half of it."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    lengths = [len(line["prompt"]) for line in lines]
    kept = [max(length - drop_end, length // 2) for length in lengths]
    return [ask(line["prompt"][:size], line["answer"]) for line, size in zip(lines, kept, strict=True)]


def after_others(tests: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """The same exchanges as second turns of conversations whose first turn is of each other task in turn."""
    found = []
    for place, own in enumerate(tests):
        others = [tests[place - shift] for shift in range(1, len(tests))]
        before = [others[index % len(others)][index % len(others[index % len(others)])] for index in range(len(own))]
        found.append(
            [
                second._replace(context=first.messages + second.context)
                for first, second in zip(before, own, strict=True)
            ]
        )
    return found


def encoded(form: TextFormat, examples: Sequence[Example], length: int) -> list[Row]:
    """Rows as a stream would learn them, each with the tokens before its last answer."""
    found = []
    for row in encode_batch(form, examples, max_seq_length=length):
        if isinstance(row, RowError):
            raise row
        last = max(
            place for place, label in enumerate(row.labels) if label != IGNORED and row.labels[place - 1] == IGNORED
        )
        found.append(Row(row.input_ids, last))
    return found


def hidden_states(base: PreTrainedModel, rows: Sequence[Row], layers: Sequence[str | int]) -> Iterator[dict]:
    """Of batches of rows of alike length: the rows, the mask and the states that enter each of some layers."""
    deepest = max((layer for layer in layers if layer != EMBEDDINGS), default=0)
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), BATCH_ROWS):
        part = ordered[start : start + BATCH_ROWS]
        ids = torch.zeros(len(part), len(part[-1].ids), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for place, row in enumerate(part):
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
            mask[place, : len(row.ids)] = True
        states = [base.get_input_embeddings()(ids)]
        if deepest:
            states = base.model(ids, mask.long(), use_cache=False, output_hidden_states=True).hidden_states
        yield {
            "rows": part,
            "mask": mask,
            "states": {layer: states[0 if layer == EMBEDDINGS else layer] for layer in layers},
        }


@torch.no_grad()
def read(base: PreTrainedModel, rows: Sequence[Row], places: Sequence[Place], *, of_tokens: bool) -> dict[Place, Read]:
    """What is read at every place; the moments of all tokens only where they are asked for."""
    layers = list(dict.fromkeys(layer for layer, _ in places))
    found: dict[Place, Read] = {}
    for batch in hidden_states(base, rows, layers):
        for place in places:
            features, _ = causal_exponential_mean(batch["states"][place[0]], mask=batch["mask"], half_life=place[1])
            part = _of_batch(features, batch["rows"], of_tokens)
            found[place] = part if place not in found else _joined(found[place], part)
    return found


def _of_batch(features: Tensor, rows: Sequence[Row], of_tokens: bool) -> Read:
    stops = [row.prompt_length - AFTER for row in rows]
    ends_ND = torch.stack([text[stop - 1] for text, stop in zip(features, stops, strict=True)])
    starts = {"rows": [0] * len(rows), "prompts": [0] * len(rows), "late": [max(stop - LATE, 0) for stop in stops]}
    moments = {}
    for name, firsts in starts.items():
        lasts = [len(row.ids) for row in rows] if name == "rows" else stops
        parts = [text[first:last] for text, first, last in zip(features, firsts, lasts, strict=True)]
        moments[name] = Moments.of(torch.cat(parts) if of_tokens else ends_ND)
    return Read(ends_ND, **moments)


def _joined(first: Read, second: Read) -> Read:
    moments = [left.plus(right) for left, right in zip(first[1:], second[1:], strict=True)]
    return Read(torch.cat([first.ends_ND, second.ends_ND]), *moments)


class Gate(NamedTuple):
    """A linear discriminant, fp64: logits = features @ rows_ED.T + bias_E."""

    rows_ED: Tensor
    bias_E: Tensor

    @classmethod
    def fitted(cls, tasks: Sequence[Read], kind: str, shrinkage: float) -> Gate:
        """From what was read of each task.

        Args:
            kind: of `GATES`.
            shrinkage: how much of the covariance's mean variance is added in all directions.
        """
        moments = [{**task._asdict(), "ends": Moments.of(task.ends_ND)} for task in tasks]
        of_means, of_covariance = GATES[kind]
        means_ED = torch.stack([of[of_means].mean_D for of in moments])
        pooled = [of[of_covariance] for of in moments]
        covariance_DD = sum(part.scatter_DD for part in pooled) / sum(part.count for part in pooled)
        variance = covariance_DD.diagonal().mean()
        covariance_DD = covariance_DD + shrinkage * variance * torch.eye(len(covariance_DD), dtype=torch.float64)
        centre_D = means_ED.mean(0)  # any point would do; a near one keeps the numbers small
        rows_ED = torch.linalg.solve(covariance_DD, (means_ED - centre_D).T).T
        return cls(rows_ED, -0.5 * (rows_ED * (means_ED + centre_D)).sum(1))

    def shares(self, tasks: Sequence[Read]) -> list[float]:
        """The share of each task's prompts that reach it."""
        return [
            float(((task.ends_ND.double() @ self.rows_ED.T + self.bias_E).argmax(1) == place).double().mean())
            for place, task in enumerate(tasks)
        ]


def main() -> None:
    """Read the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=parse_router_layer, nargs="+", default=[EMBEDDINGS])
    parser.add_argument("--half_lives", type=float, nargs="+", default=[2, 4, 8, 16, 32, 64, 128, float("inf")])
    parser.add_argument("--shrinkages", type=float, nargs="+", default=[0.02, 0.05, 0.2, 1.0])
    parser.add_argument("--train_rows", type=int, default=200)
    parser.add_argument("--test_rows", type=int, default=100)
    parser.add_argument("--max_seq_length", type=int, default=512, help="of a row; twice as many of two turns")
    parser.add_argument("--drop_end", type=int, default=0, help="leave out so many characters of each prompt's end")
    asked = parser.parse_args()
    form = text_format(load_tokenizer(asked.model))
    train, tests = (
        [read_exchanges(asked.data / task / f"{split}.jsonl", count, drop_end=asked.drop_end) for task in TASKS]
        for split, count in (("train", asked.train_rows), ("test", asked.test_rows))
    )
    for split, found in (("train", train), ("test", tests)):
        print(f"{split} prompts: {', '.join(f'{name} {len(of)}' for name, of in zip(TASKS, found, strict=True))}")
    asked_alone = [encoded(form, of, asked.max_seq_length) for of in tests]
    asked_later = [encoded(form, of, 2 * asked.max_seq_length) for of in after_others(tests)]
    base = load_base(asked.model, dtype=torch.float32).eval()
    deepest = max((layer for layer in asked.layers if layer != EMBEDDINGS), default=0)
    base.model.layers = base.model.layers[: deepest + 1]  # the states behind the last one pass the final norm
    places = list(itertools.product(asked.layers, asked.half_lives))
    read_train = [read(base, encoded(form, of, asked.max_seq_length), places, of_tokens=True) for of in train]
    judged = {
        name: [read(base, of, places, of_tokens=False) for of in rows]
        for name, rows in (("alone", asked_alone), ("second turn", asked_later))
    }
    print(f"\n| layer | half-life | shrinkage | asked | {' | '.join(GATES)} |\n|{'---|' * (4 + len(GATES))}")
    for place, shrinkage in itertools.product(places, asked.shrinkages):
        gates = [Gate.fitted([of[place] for of in read_train], kind, shrinkage) for kind in GATES]
        for name, found in judged.items():
            shares = [gate.shares([of[place] for of in found]) for gate in gates]
            cells = [f"{sum(of) / len(of):.4f} / {min(of):.3f}" for of in shares]
            print(f"| {place[0]} | {place[1]:g} | {shrinkage:g} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
