"""Who wrote each answer is told at a training's end, by `dylora generate`, on the run's page and in the model card."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from reference.pages import HOSTILE, Reader, read
from reference.runs import flags, tiny_run_folder
from reference.tiny import tiny_moe
from reference.turns import BY_ANSWER

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.cli import main
from dylo_moe.report.charts import colour_class
from dylo_moe.report.pages import write_report
from dylo_moe.report.terminal import show_routing
from dylo_moe.report.turns import Answer, turns_in_words
from dylo_moe.utils.screen import Screen


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """That of a run which routes answers, two experts each."""
    folder = tiny_run_folder(tmp_path_factory.mktemp("turns"), is_chat=True)
    words = flags(folder, folder / "out", "--granularity", "response", "--top_k", "2", "--max_steps", "4")
    assert main(["train", *words]) == 0
    return folder


def lines_of(reader: Reader) -> list[tuple[str, str]]:
    """(class, text) of each line about turns on a page."""
    place = [index for index, (_, attrs) in enumerate(reader.opened) if attrs.get("class") == "turns"]
    found = []
    for index in place:
        rest = zip(reader.opened[index + 1 :], reader.texts[index + 1 :], strict=True)
        for (tag, attrs), text in rest:
            if tag not in ("li", "i"):
                break
            found += [(attrs["class"], text)] if tag == "li" else []
    return found


def test_a_runs_samples_and_its_page_tell_who_wrote_each_answer(folder):
    samples = json.loads((folder / "out" / "samples.json").read_text())
    page, wanted = write_report(str(folder / "out")), []
    for sample in samples:
        assert sample["turns"][0]["start"] == sample["prompt_length"] - 1
        written: set[int] = set()
        for number, turn in enumerate(sample["turns"], 1):  # so young a model may write a header too
            assert sample["tokens"][turn["start"]] == "<assistant>"
            written |= {*range(turn["start"], turn["stop"])}
            (first, weight), (second, rest) = sorted(turn["experts"].items(), key=lambda item: -item[1])
            size = turn["stop"] - turn["start"]
            text = f"answer {number}, {size} token{'s' * (size > 1)}: written by "
            wanted.append((colour_class(int(first[-1])), text + f"{first} ({weight:.2f}), {second} ({rest:.2f})"))
        assert {place for place, expert in enumerate(sample["experts"]) if expert is not None} == written
        num_read = len(sample["tokens"]) - len(written)
        wanted.append(("base", f"the other {num_read} tokens: read by the unchanged base"))
    assert lines_of(Reader(read(page))) == wanted
    assert "All other tokens are read by the unchanged base, and are not counted." in read(page)
    assert "share of all training answers' tokens" in html.unescape(read(page))


@pytest.mark.parametrize(
    ("more", "writer"),
    [
        (["--expert", "expert_1"], "written by expert_1"),
        (["--expert", "base"], "written by the unchanged base"),
        (["--raw"], "no answer begins in this text, so that the unchanged base read and wrote all of it"),
    ],
    ids=str,
)
def test_generate_tells_who_wrote_the_answer(more, writer, folder, capsys):
    words = ["generate", "--checkpoint", str(folder / "out"), "--prompt", "w1 w2 w3", "--max_new_tokens", "4"]
    assert main([*words, *more]) == 0
    said = capsys.readouterr().out.splitlines()
    if more == ["--raw"]:
        assert said[-1] == writer
    else:
        assert said[-2].startswith("answer 1, ") and said[-2].endswith(writer)
        assert said[-1].endswith("read by the unchanged base")


def test_the_card_names_the_tokens_that_open_and_close_an_answer(folder):
    card = (folder / "out" / "checkpoint" / "README.md").read_text()
    tokenizer = load_tokenizer(str(folder / "base"))
    opens, closes = (tokenizer.convert_tokens_to_ids(token) for token in ("<assistant>", "</s>"))
    assert f"the header of an answer is `{opens}`; the answer is recognised by `{opens}`" in card
    assert f"an answer ends with `{closes}`" in card
    assert "a router that sends each answer of a conversation to 2 of them" in card


def test_a_pages_turns_may_be_anything(folder, tmp_path):
    other = tmp_path / "out"
    other.mkdir()
    turns = [{"start": 0, "stop": 2, "experts": {HOSTILE: 1.0}}, 7, {"start": "x"}, {"start": 1, "stop": 2}]
    sample = {"domain": "d", "prompt_length": 1, "tokens": ["a", "b", "c"], "experts": [HOSTILE, HOSTILE, None]}
    (other / "samples.json").write_text(json.dumps([sample | {"turns": turns}, sample | {"turns": "no"}]))
    (other / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 2.0}\n')
    reader = Reader(read(write_report(str(other))))
    assert lines_of(reader) == [
        ("base", f"answer 1, 2 tokens: written by {HOSTILE}"),
        ("base", "the other 1 token: read by the unchanged base"),
    ]
    assert "script" not in reader.tags


def test_a_text_that_is_all_answer_has_no_rest():
    assert turns_in_words([Answer(3, {"a": 1.0})], num_tokens=3) == ["answer 1, 3 tokens: written by a"]


@pytest.mark.parametrize(
    ("granularity", "says"),
    [
        ({"granularity": "token"}, "routed: each token on its own (granularity token)"),
        ({"granularity": "sequence"}, "routed: each text as a whole, by its prompt (granularity sequence)"),
        (BY_ANSWER, "routed: each answer as a whole, by its prompt, which the base reads (granularity response)"),
    ],
    ids=["token", "sequence", "response"],
)
def test_a_run_says_what_it_routes_as_a_whole(granularity, says, capsys):
    show_routing(Screen("train"), tiny_moe(**granularity))
    assert says in " ".join(capsys.readouterr().out.split())
