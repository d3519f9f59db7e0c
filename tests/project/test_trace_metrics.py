"""benchmarks/continual/trace.py: its metrics against examples worked by hand, three a metric, and its rows."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType

import pytest
import torch
from reference.paths import ROOT

FOLDER = ROOT / "benchmarks" / "continual"


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The benchmark's modules, which import each other as scripts of one folder do."""
    sys.path.insert(0, str(FOLDER))
    try:
        return {name: importlib.import_module(name) for name in ("trace_metrics", "trace_tasks")}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def metrics(modules):
    return modules["trace_metrics"]


@pytest.mark.parametrize(
    ("generated", "answer", "points"), [(" B", "B\nA clause is a group of words.", 100), ("b", "B", 0), ("", "A", 0)]
)
def test_only_the_letter_counts(metrics, generated, answer, points):
    assert metrics.letter("", generated, answer) == points


@pytest.mark.parametrize(("generated", "answer", "points"), [("13.5\n", "13.5", 100), ("13", "13.5", 0), ("", "6", 0)])
def test_a_number_is_right_or_wrong(metrics, generated, answer, points):
    assert metrics.exact("", generated, answer) == points


@pytest.mark.parametrize(
    ("generated", "answer", "points"),
    [
        ("abcd", "abxd", 75.0),  # a, b, d in common: 2 * 3 / 8
        ("return <STR_LIT:a>", "return a ", 100.0),  # placeholders are written out, space around does not count
        ("", "return a", 0.0),
    ],
)
def test_edit_similarity(metrics, generated, answer, points):
    assert metrics.similarity("", generated, answer) == pytest.approx(points)


def test_sari_of_the_answer_itself_is_whole(metrics):
    """Everything that is added, kept and deleted is right, for every length; 0/0 counts as 1."""
    assert metrics.sari("the old cat sat down", "the cat sat", "the cat sat") == pytest.approx(100)


def test_sari_of_the_source_itself(metrics):
    """a b c with reference a b d, and nothing changed.

    Nothing is added: precision 0/0 = 1, recall 0, so F1 = 0 for n = 1 to 3; for n = 4 there is nothing anywhere, 1.
    Kept: n = 1: 2 of 3 are right, and both that should be: 2 * 2/3 / (5/3) = 0.8; n = 2: 1 of 2, 1 of 1: 2/3; n = 3: 0
    of 1, and 0/0: 0; n = 4: 1. Nothing is deleted: 1 for every n.
    """
    by_hand = ((0 + 0.8 + 1) + (0 + 2 / 3 + 1) + (0 + 0 + 1) + (1 + 1 + 1)) / 3 / 4
    assert metrics.sari("a b c", "a b c", "a b d") == pytest.approx(100 * by_hand)


def test_sari_of_a_change_in_a_prompt(metrics):
    """A b. becomes B c, and should become b d: words are lower-cased and the full stop is one.

    n = 1: c is added and d should be: 0. b is kept, rightly, and nothing else should be: 1. a and the stop are deleted,
    rightly: 1. n = 2: "b c" is added and "b d" should be: 0; nothing is kept nor should be: 1; "a b" and "b ." are
    deleted, rightly: 1. n = 3: nothing is added nor should be: 1, nothing kept: 1, "a b ." deleted: 1. n = 4: 1.
    """
    prompt = "Provide a simplified version.\n\nParagraph:\nA b.\n\nSimplification:"
    by_hand = ((0 + 1 + 1) / 3 + (0 + 1 + 1) / 3 + 1 + 1) / 4
    assert metrics.sari(prompt, "B c", "b d") == pytest.approx(100 * by_hand)


class Letters:
    """A tokenizer with one token a letter; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def test_a_long_row_loses_the_beginning_of_its_prompt_and_only_the_answer_is_predicted(modules):
    rows, num_cut, prompts = modules["trace_tasks"].encode(
        Letters(), [{"prompt": "abcdef", "answer": "xy"}, {"prompt": "a", "answer": "x"}], 6
    )
    assert rows.input_ids.tolist() == [[4, 5, 6, 24, 25, 0], [1, 24, 0, 0, 0, 0]]
    assert rows.labels.tolist() == [[-100, -100, -100, 24, 25, 0], [-100, 24, 0, -100, -100, -100]]
    assert rows.attention_mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert (num_cut, prompts) == (1, [[4, 5, 6], [1]])


def test_replay_takes_the_place_of_as_many_rows(modules, tmp_path):
    tasks = modules["trace_tasks"]
    read = []
    for name, letter in (("FOMC", "a"), ("Py150", "b"), ("ScienceQA", "c")):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            lines = [json.dumps({"prompt": letter, "answer": letter})] * 40
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(lines))
        read.append(tasks.read_task(tmp_path, name, Letters(), num_train=40, num_test=2, max_length=256))
    firsts = [tasks.with_replay(read, place, 0.05, seed=0).input_ids[:, 0] for place in range(3)]
    assert [int((first == 3).sum()) for first in firsts] == [0, 0, 38]
    assert [len(first) for first in firsts] == [40, 40, 40] and torch.equal(firsts[0], read[0].train.input_ids[:, 0])
