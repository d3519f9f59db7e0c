"""Which layer should the router read, and how long should its memory be?

    python benchmarks/routing/router_features.py [--model smollm2-135m] [--texts 60]

For every pair (layer, half-life) a linear gate is fitted in closed form (a linear discriminant on the
router's own features) and scored on the tokens of held-out documents:

  kinds     Python functions, C++ headers, English reference, CMake: other words
  tasks     "write this function" against "explain this function": the same words, another meaning
  switch    two held-out texts of different kinds, one after the other; the second text's tokens 32 on

The score is the share of tokens sent to their own skill, over all tokens of a text unless said.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.data.encoding import encode_batch, text_format
from dylo_moe.data.sources.examples import Example, RowError, ask
from dylo_moe.data.sources.machine_text import Passage, read_machine_text
from dylo_moe.routing.features import causal_exponential_mean

KINDS = ("python_functions", "cpp_headers", "english_reference", "cmake")
TASKS = ("write", "explain")
HALF_LIVES = (8.0, 16.0, 32.0, 64.0, 128.0, float("inf"))
MAX_TOKENS = 192
SWITCH_AFTER, SETTLED = 96, 32


class Text(NamedTuple):
    """One tokenised text and the skill it belongs to."""

    ids: list[int]
    skill: int


def explain(passage: Passage) -> Passage:
    """The same function the other way round: asked for by its source, answered by its docstring."""
    assert passage.prompt is not None
    request, docstring = passage.prompt.split("\n\n", 1)
    name = request.split("`")[1]
    return Passage(f"Explain the Python function `{name}`.\n\n{passage.response}", docstring, passage.document)


def read_kind(name: str) -> list[list[Passage]]:
    """Passages by document."""
    documents: dict[str, list[Passage]] = {}
    for passage in read_machine_text(name)[0]:
        documents.setdefault(passage.document, []).append(passage)
    return list(documents.values())


def example_of(passage: Passage) -> Example:
    """What is learned from a passage."""
    return Example((), passage.response) if passage.prompt is None else ask(passage.prompt, passage.response)


def collect(names: Sequence[str], tokenizer, count: int) -> tuple[list[Text], list[Text]]:
    """`count` training texts and half as many held-out ones for each skill, from different documents."""
    form = text_format(tokenizer)
    train: list[Text] = []
    held_out: list[Text] = []
    for skill, name in enumerate(names):
        texts: list[list[Text]] = []
        for document in read_kind("python_functions" if name in TASKS else name):
            passages = [explain(passage) for passage in document] if name == "explain" else document
            rows = encode_batch(form, [example_of(passage) for passage in passages], max_seq_length=MAX_TOKENS)
            texts.append([Text(row.input_ids, skill) for row in rows if not isinstance(row, RowError)])
        cut = len(texts) * 2 // 3
        train += spread(texts[:cut], count)
        held_out += spread(texts[cut:], count // 2)
    return train, held_out


def spread(documents: list[list[Text]], count: int) -> list[Text]:
    """`count` texts, taken in turn from the documents, so that none dominates."""
    rounds = itertools.zip_longest(*documents)
    return [text for texts in rounds for text in texts if text is not None][:count]


@torch.no_grad()
def hidden_states(model, texts: list[Text], layers: Sequence[int]) -> dict[int, list[Tensor]]:
    """For each layer, the states entering it, fp32 [tokens, hidden] a text."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for text in texts:
        states = model(input_ids=torch.tensor([text.ids]), output_hidden_states=True).hidden_states
        for layer in layers:
            found[layer].append(states[layer][0].float())
    return found


def features(states: list[Tensor], half_life: float) -> list[Tensor]:
    """The router's features of each text."""
    return [
        causal_exponential_mean(state[None], mask=torch.ones(1, len(state), dtype=torch.bool), half_life=half_life)[0][
            0
        ]
        for state in states
    ]


def fit_gate(rows: list[Tensor], labels: list[int], num_skills: int) -> tuple[Tensor, Tensor]:
    """A linear discriminant: one mean per skill, one pooled covariance, a little shrinkage."""
    x = torch.cat(rows).double()
    y = torch.cat([torch.full((len(row),), label) for row, label in zip(rows, labels, strict=True)])
    means = torch.stack([x[y == skill].mean(0) for skill in range(num_skills)])
    centered = x - means[y]
    covariance = centered.T @ centered / len(x)
    covariance += 0.05 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weights = torch.linalg.solve(covariance, means.T).T
    return weights, -0.5 * (weights * means).sum(1)


def accuracy(
    gate: tuple[Tensor, Tensor], rows: list[Tensor], labels: list[int], start: int = 0, stop: int = 10**9
) -> float:
    """Share of the tokens at positions [start, stop) that go to their own skill."""
    right = total = 0
    for row, label in zip(rows, labels, strict=True):
        part = row[start:stop].double()
        right += int(((part @ gate[0].T + gate[1]).argmax(1) == label).sum())
        total += len(part)
    return right / max(total, 1)


def switched(texts: list[Text]) -> list[tuple[Text, int]]:
    """Texts that change subject: the first part of one and the whole of another kind."""
    pairs = []
    for index, text in enumerate(texts):
        other = texts[(index * 7 + len(texts) // 2) % len(texts)]
        if other.skill != text.skill and len(text.ids) >= SWITCH_AFTER // 2 and len(other.ids) > SETTLED:
            head = (text.ids * 2)[:SWITCH_AFTER]
            pairs.append((Text(head + other.ids, other.skill), SWITCH_AFTER + SETTLED))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=60, help="training texts a skill; half as many are held out")
    arguments = parser.parse_args()
    model, tokenizer = load_base(arguments.model, dtype=torch.float32).eval(), load_tokenizer(arguments.model)
    num_layers = model.config.get_text_config().num_hidden_layers
    layers = sorted({0, num_layers // 8, num_layers // 4, num_layers // 2, 3 * num_layers // 4})
    kinds, tasks = collect(KINDS, tokenizer, arguments.texts), collect(TASKS, tokenizer, arguments.texts)
    pairs = switched(kinds[1])
    print(f"{arguments.model}: {len(kinds[0])} + {len(tasks[0])} training texts, ", end="")
    print(f"{len(kinds[1])} + {len(tasks[1])} held out, {len(pairs)} that change subject")
    states = {
        name: hidden_states(model, texts, layers)
        for name, texts in (
            ("kinds", kinds[0]), ("kinds held out", kinds[1]), ("tasks", tasks[0]), ("tasks held out", tasks[1]),
            ("switch", [text for text, _ in pairs]),
        )
    }  # fmt: skip
    print("| layer | half-life | kinds 0-8 | 8-32 | 32-128 | kinds | switch | tasks 0-32 | 32 on | tasks |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for layer, half_life in itertools.product(layers, HALF_LIVES):
        rows = {name: features(found[layer], half_life) for name, found in states.items()}
        gate = fit_gate(rows["kinds"], [text.skill for text in kinds[0]], len(KINDS))
        labels = [text.skill for text in kinds[1]]
        cells = [accuracy(gate, rows["kinds held out"], labels, *span) for span in ((0, 8), (8, 32), (32, 128), (0,))]
        after = [row[start:] for row, (_, start) in zip(rows["switch"], pairs, strict=True)]
        cells.append(accuracy(gate, after, [text.skill for text, _ in pairs]))
        gate = fit_gate(rows["tasks"], [text.skill for text in tasks[0]], len(TASKS))
        labels = [text.skill for text in tasks[1]]
        cells += [accuracy(gate, rows["tasks held out"], labels, *span) for span in ((0, 32), (32,), (0,))]
        name = "embeddings" if layer == 0 else str(layer)
        print(f"| {name} | {half_life:g} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
