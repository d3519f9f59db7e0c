"""Laws of loading: nothing held out is trained on, nothing is lost silently, and the same seed gives the same rows."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.paths import ROOT, TESTS
from reference.texts import CHAT, END, PLAIN, byte_tokenizer, numbered, write_rows

from dylo_moe.data import tokenizing as rows_module
from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
from dylo_moe.data.mixing import epoch_rows
from dylo_moe.data.sources.catalog import MACHINE_TEXT
from dylo_moe.data.sources.machine_text import Passage, choose_evenly, read_cpp_headers
from dylo_moe.data.sources.pieces import cut_pieces
from dylo_moe.data.splitting import find_duplicates, hold_out, subset


def load(names, tokenizer=PLAIN, *, seed=0, max_seq_length=64, **options):
    return load_data(DataConfig(datasets=names, max_seq_length=max_seq_length, **options), tokenizer, seed=seed)


def as_rows(data) -> list[dict]:
    return [*data.train, *(row for name in data.names for row in data.evaluation[name])]


def assert_accounted_for(data):
    for count in data.counts:
        gone = count.too_long + count.empty + count.malformed + count.duplicates + count.duplicates_across
        gone += count.held_out + count.contaminated + count.search
        assert count.read == count.train + count.evaluation + count.unused + gone, count


# What becomes of rows


def test_no_held_out_text_is_trained_on_and_every_row_is_accounted_for(tmp_path):
    rows = [{"text": f"text {i % 70}"} for i in range(100)]  # 30 repeated
    rows += [{"text": f"a {END} b"}, {"text": "x" * 100}, {"text": "x" * 101}]  # as text, cut, equal once cut
    rows += [{"text": " "}, {"text": None}, {"text": 3}, {"other": "a"}]
    one = write_rows(tmp_path / "one.jsonl", rows)
    two = write_rows(tmp_path / "two.jsonl", [{"text": f"text {i}"} for i in range(60, 100)])  # 10 from one
    data = load([one, two], max_seq_length=32)
    first, second = data.counts
    assert (first.read, first.duplicates, first.duplicates_across) == (107, 31, 0)
    assert (first.malformed, first.empty, first.cut_response) == (2, 2, 1)
    assert (second.read, second.duplicates, second.duplicates_across, second.malformed) == (40, 0, 10, 0)
    assert_accounted_for(data)
    for count in data.counts:
        assert count.evaluation == round(0.1 * (count.train + count.evaluation)) == len(data.evaluation[count.name])
    texts = [tuple(row["input_ids"]) for row in as_rows(data)]
    assert len(set(texts)) == len(texts) == 72 + 30
    assert list(data.train["domain"]) not in (sorted(data.train["domain"]), sorted(data.train["domain"])[::-1])
    domains = Counter(data.train["domain"])
    assert [domains[0], domains[1]] == [first.train, second.train]
    assert {row["domain"] for row in data.evaluation["two"]} == {1}
    reasons = {(reason.num_rows, reason.text, reason.first) for reason in data.reasons["one"]}
    assert (1, f"it holds {END}, written as plain characters", "one.jsonl:101") in reasons
    assert (1, "text is null", "one.jsonl:105") in reasons


def test_rows_that_are_too_long_can_be_dropped_instead_of_cut(tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", [{"prompt": f"{i} " * i, "response": f"{i}"} for i in range(1, 31)])
    cut, dropped = (load([path], overlong=overlong, max_seq_length=40) for overlong in ("cut", "drop"))
    assert cut.counts[0].too_long == dropped.counts[0].cut_prompt == 0
    assert cut.counts[0].cut_prompt == dropped.counts[0].too_long > 5
    assert max(dropped.train["length"]) <= 40 == max(cut.train["length"])
    assert_accounted_for(dropped)


def test_no_question_that_is_held_out_anywhere_is_trained_on(tmp_path):
    """Same questions with other answers, within and across datasets."""
    rows = [{"prompt": f"question {i % 40}", "response": f"answer {i}"} for i in range(120)]
    one = write_rows(tmp_path / "one.jsonl", rows)
    two = write_rows(tmp_path / "two.jsonl", [{**row, "response": row["response"] + "!"} for row in rows])
    own = [{"prompt": f"own {i}", "response": "a"} for i in range(20)]
    given = tmp_path / "given"
    given.mkdir()
    write_rows(given / "train.jsonl", own + rows[:30])
    write_rows(given / "validation.jsonl", [{"prompt": f"own {i}", "response": "b"} for i in range(5)])
    for seed in range(4):
        data = load([one, two, str(given)], seed=seed)
        trained = {PLAIN.decode(row["input_ids"]).split("\n\n")[0] for row in data.train}
        judged = {
            PLAIN.decode(row["input_ids"]).split("\n\n")[0] for name in data.names for row in data.evaluation[name]
        }
        assert judged and trained and trained.isdisjoint(judged)
        assert data.counts[2].held_out >= 5 and data.counts[2].evaluation == 5
        assert_accounted_for(data)


@pytest.mark.parametrize("percent", [0.0, 20.0])
def test_rows_of_a_search_are_the_same_for_all_seeds_and_nobody_trains_or_judges_them(percent, tmp_path):
    """Nor a question of them: questions come again within and across datasets, and in a validation split."""
    rows = [{"prompt": f"question {i % 40}", "response": f"answer {i}"} for i in range(120)]
    one = write_rows(tmp_path / "one.jsonl", rows)
    two = write_rows(tmp_path / "two.jsonl", [{**row, "response": row["response"] + "!"} for row in rows])
    (tmp_path / "given").mkdir()
    other = [{**row, "response": row["response"] + "?"} for row in rows]
    write_rows(tmp_path / "given" / "train.jsonl", [{"prompt": f"own {i}", "response": "a"} for i in range(20)] + other)
    write_rows(tmp_path / "given" / "validation.jsonl", [{"prompt": f"own {i}", "response": "b"} for i in range(5)])

    def questions(parts):
        return {PLAIN.decode(row["input_ids"]).split("\n\n")[0] for part in parts for row in part}

    found = []
    for seed in range(4):
        data = load([one, two, str(tmp_path / "given")], seed=seed, search_subset=percent)
        assert_accounted_for(data)
        assert [count.search for count in data.counts] == [len(data.search.get(name, ())) for name in data.names]
        found.append({name: sorted(map(tuple, part["input_ids"])) for name, part in data.search.items()})
        searched = questions(data.search.values())
        assert searched.isdisjoint(questions([data.train])) and searched.isdisjoint(questions(data.evaluation.values()))
        assert any(key.endswith("search rows") for key in data.fingerprint) == (percent > 0)
    assert found[0] == found[1] == found[2] == found[3] and set(found[0]) == (set(data.names) if percent else set())
    assert all(0.15 * count.read < count.search < 0.25 * count.read for count in data.counts) or not percent


def test_files_of_the_same_name_in_two_datasets_are_two_documents(tmp_path):
    """Reported: a setup.py held out in one repository took that of another out of training."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in range(12):
            (tmp_path / name / f"m{file}.py").write_text("\n\n".join(f"{name}_{file}_{i} = {i}" for i in range(9)))
    data = load([str(tmp_path / "one"), str(tmp_path / "two")], max_seq_length=32)
    assert [count.held_out for count in data.counts] == [0, 0]
    assert [count.documents for count in data.counts] == [12, 12]


def test_a_question_held_out_elsewhere_is_not_trained_in_a_dataset_that_asks_nothing_else(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": "again", "response": f"{i}"} for i in range(20)])
    rows = [{"prompt": f"question {i}", "response": "a"} for i in range(19)]
    two = write_rows(tmp_path / "two.jsonl", [*rows, {"prompt": "again", "response": "b"}])
    seen = set()
    for seed in range(30):
        try:
            data = load([one, two], seed=seed)
        except ValueError as error:
            assert "has 20 rows: 2 would be held out, 0 trained, and the others repeat a row, or ask" in str(error)
            seen.add("refused")
        else:
            judged = [PLAIN.decode(ids) for ids in data.evaluation["two"]["input_ids"]]
            assert not any(text.startswith("again") for text in judged)
            seen.add("trained")
    assert seen == {"refused", "trained"}


def test_a_training_row_that_repeats_a_validation_row_of_another_dataset_is_removed(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(30)]
    one = write_rows(tmp_path / "one.jsonl", rows)
    (tmp_path / "two").mkdir()
    write_rows(tmp_path / "two" / "train.jsonl", [{"text": f"other {i}"} for i in range(20)])
    write_rows(tmp_path / "two" / "validation.jsonl", rows[:10])
    data = load([one, str(tmp_path / "two")])
    assert data.counts[0].duplicates_across == 10 and data.counts[1].evaluation == 10


def test_a_dataset_of_which_nothing_is_left_is_named(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(30)]
    one, two = write_rows(tmp_path / "one.jsonl", rows), write_rows(tmp_path / "two.jsonl", rows)
    with pytest.raises(ValueError, match=r"'two' .* has 30 rows, of which 0 are usable \(30 that repeat another row\)"):
        load([one, two])
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": " "}, {"text": 3}])
    with pytest.raises(
        ValueError, match=r"'bad' .* has no usable row: text is empty \(1 row, first bad.jsonl:1\); text is not"
    ):
        load([one, bad])
    long = write_rows(tmp_path / "long.jsonl", [{"text": f"{i}" * 30} for i in range(10, 40)])
    with pytest.raises(ValueError, match=r"has no usable row: over 16 tokens \(30 rows\)"):
        load([long], overlong="drop", max_seq_length=16)


def test_two_documents_can_be_split_and_one_cannot(tmp_path):
    data = load([numbered(tmp_path / "two.jsonl", 2, "cube")])
    assert (data.counts[0].train, data.counts[0].evaluation) == (1, 1)
    path = numbered(tmp_path / "single.jsonl", 1, "cube")
    with pytest.raises(ValueError) as raised:
        load([path])
    assert str(raised.value).startswith(f"the dataset 'single' (file {path}) has 1 row, and needs at least two")
    assert "give --datasets a folder with the files train.jsonl and validation.jsonl" in str(raised.value)


def test_a_validation_split_that_holds_every_row_leaves_none_to_train(tmp_path):
    for split, count in (("train", 3), ("validation", 5)):
        write_rows(tmp_path / f"{split}.jsonl", [{"text": f"text {i}"} for i in range(count)])
    message = r"has 8 rows, of which 5 are usable \(3 that repeat another row\): 5 would be held out, 0 trained"
    with pytest.raises(ValueError, match=message):
        load([str(tmp_path)])


def test_one_question_with_many_answers_is_split_by_rows_and_says_so(tmp_path):
    path = write_rows(tmp_path / "one.jsonl", [{"prompt": "again", "response": f"{i}"} for i in range(30)])
    data = load([path])
    assert data.counts[0].evaluation == 3
    assert data.notes == ["one is one document, or asks one question, so it is split by rows."]


def test_no_held_out_document_gives_a_training_row(tmp_path):
    """Files of different sizes, each on one side as a whole."""
    folder = tmp_path / "files"
    folder.mkdir()
    for file in range(30):
        text = "\n\n".join(f"{file}:{part} " + "x" * 60 for part in range(1 + file % 7))
        (folder / f"f{file}.txt").write_text(text)
    splits = set()
    for seed in range(5):
        data = load([str(folder)], seed=seed, max_seq_length=96)
        decoded = [[PLAIN.decode(ids) for ids in part["input_ids"]] for part in (data.train, data.evaluation["files"])]
        train, held_out = ({text.split(":")[0] for text in texts} for texts in decoded)
        assert train.isdisjoint(held_out) and len(train | held_out) == 30
        assert 0 < data.counts[0].evaluation <= round(0.1 * data.counts[0].read)
        splits.add(frozenset(held_out))
    assert len(splits) > 1


# Choices


def test_subsets_are_shares_of_each_dataset_and_lie_inside_each_other(tmp_path):
    names = [numbered(tmp_path / "a.jsonl", 200, "cube"), numbered(tmp_path / "b.jsonl", 100, "square")]
    parts = {percent: load(names, training_subset=percent, eval_subset=percent) for percent in (0.01, 10, 50, 100)}
    assert [count.train for count in parts[100].counts] == [180, 90]
    assert [count.train for count in parts[50].counts] == [90, 45]
    assert [count.evaluation for count in parts[50].counts] == [10, 5]
    assert [count.unused for count in parts[50].counts] == [100, 50]
    assert [count.train for count in parts[0.01].counts] == [1, 1]
    every, half = (list(parts[percent].evaluation["a"]["input_ids"]) for percent in (100, 50))
    places = [every.index(ids) for ids in half]
    assert places == sorted(places) and places[-1] - places[0] >= len(places)  # spread, not the first ones
    smaller: set[tuple[int, ...]] = set()
    for percent in sorted(parts):
        texts = {tuple(row["input_ids"]) for row in as_rows(parts[percent])}
        assert smaller < texts
        smaller = texts
        assert_accounted_for(parts[percent])


DIGEST = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[1])
import test_loading
data = test_loading.load(["english_reference", "cmake", sys.argv[2]], test_loading.CHAT, seed=3)
print(hashlib.sha256(json.dumps([test_loading.as_rows(data), data.sample_prompts]).encode()).hexdigest())
"""


def test_the_same_seed_gives_the_same_rows_in_another_process_with_any_number_of_workers(tmp_path):
    path = numbered(tmp_path / "mine.jsonl", 50, "cube")
    digests = [
        subprocess.run(
            [sys.executable, "-c", DIGEST, str(Path(__file__).parent), path],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]),
                "HF_DATASETS_CACHE": str(tmp_path / f"cache{hash_seed}"),
            },
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert digests[0] == digests[1] and len(digests[0].strip()) == 64


def test_several_processes_give_the_rows_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MIN_BYTES_PER_PROCESS", 500)
    path = numbered(tmp_path / "mine.jsonl", 61, "cube")
    found = []
    for workers in (1, 3):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache{workers}")
        found.append(as_rows(load([path], preprocessing_num_workers=workers)))
        (folder,) = (tmp_path / f"cache{workers}").glob("dylora-rows")
        assert len(list(folder.glob("*.arrow"))) == workers
    assert found[0] == found[1]


def test_the_split_follows_the_questions_not_the_tokenizer_or_the_order(tmp_path):
    """The same rows are held out for another base, and from a mirror in another order."""
    path = numbered(tmp_path / "mine.jsonl", 100, "cube")
    lines = (tmp_path / "mine.jsonl").read_text().splitlines()
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(lines[::-1]) + "\n")

    def held_out(data):
        (rows,) = data.evaluation.values()
        texts = [CHAT.decode(ids) for ids in rows["input_ids"]]
        prompts = [json.loads(line)["prompt"] for line in lines]
        return {prompt for prompt in prompts if any(prompt in text for text in texts)}

    assert held_out(load([path])) == held_out(load([path], CHAT)) == held_out(load([str(turned)]))


def test_another_seed_gives_another_order_and_split(tmp_path):
    path = numbered(tmp_path / "mine.jsonl", 50, "cube")
    one, other = (load([path], seed=seed) for seed in (1, 2))
    assert one.train["input_ids"] != other.train["input_ids"]
    assert one.evaluation["mine"]["input_ids"] != other.evaluation["mine"]["input_ids"]


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5), min_size=2, max_size=60),
    seed=st.integers(0, 9),
)
def test_held_out_documents_are_whole_and_about_a_tenth(documents, seed):
    if len(set(documents)) < 2:
        return
    values = np.array(documents, np.int64)
    held = hold_out(values, seed)
    assert 0 < held.sum() < len(values)
    assert not set(values[held]) & set(values[~held])
    sizes = Counter(documents)
    assert held.sum() <= max(1, round(len(values) / 10)) or held.sum() == min(sizes.values())
    order = np.random.default_rng(seed).permutation(len(values))
    assert (hold_out(values[order], seed) == held[order]).all()


@settings(max_examples=200, deadline=None)
@given(
    data=st.lists(
        st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=12), min_size=1, max_size=4
    )
)  # fmt: skip
def test_duplicates_are_those_of_a_loop_with_a_set(data):
    digests = [np.array([value for value, _ in part], np.int64) for part in data]
    first = [np.array([flag for _, flag in part], bool) for part in data]
    owner: dict[int, int] = {}
    expected = [[-1] * len(part) for part in data]
    for wanted in (True, False):
        for place, part in enumerate(data):
            for index, (value, flag) in enumerate(part):
                if flag == wanted:
                    if value in owner:
                        expected[place][index] = owner[value]
                    else:
                        owner[value] = place
    assert [found.tolist() for found in find_duplicates(digests, first)] == expected


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 50), percent=st.floats(0.01, 100))
def test_a_subset_is_that_percentage_without_repeats(count, percent):
    places = subset(np.arange(count), percent, 0)
    assert len(places) == len(set(places.tolist())) == max(1, round(count * percent / 100))


# Mixing


def test_concatenation_weighs_by_size(tmp_path):
    data = load([numbered(tmp_path / "a.jsonl", 200, "cube"), numbered(tmp_path / "b.jsonl", 100, "square")])
    assert [(share.rows, share.passes) for share in data.shares] == [(180, 1.0), (90, 1.0)]
    assert data.shares[0].share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("sizes", "options", "shares"),
    [
        ((200, 40), {"interleaved_sampling": True}, (0.5, 0.5)),
        ((200, 40, 100), {"interleaved_sampling": True}, (1 / 3, 1 / 3, 1 / 3)),
        ((200, 40), {"mix": ["d0=0.7,d1=0.3"]}, (0.7, 0.3)),
        ((50, 200, 100), {"mix": ["d0=0.5", "d1=0.3", "d2=0.2"]}, (0.5, 0.3, 0.2)),
    ],
)
def test_the_shares_of_an_epoch_are_those_asked_for_and_those_that_are_trained(tmp_path, sizes, options, shares):
    """Counted over one epoch of the batches that the Trainer really makes."""
    from reference.tiny import tiny_moe
    from transformers import TrainingArguments

    from dylo_moe.data.collator import Collator
    from dylo_moe.training.trainer import DyLoRATrainer

    names = [numbered(tmp_path / f"d{place}.jsonl", size, f"word{place}") for place, size in enumerate(sizes)]
    data = load(names, **options)
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=8, remove_unused_columns=False, use_cpu=True
    )
    trainer = DyLoRATrainer(
        model=tiny_moe("llama"),
        args=arguments,
        train_dataset=data.train,
        data_collator=Collator(PLAIN),
        domains=data.names,
    )
    batches = list(trainer.get_train_dataloader())
    domains = Counter(domain for batch in batches for domain in batch["domain"].tolist())
    total = sum(domains.values())
    tokens = Counter()
    for batch in batches:
        for labels, domain in zip(batch["labels"], batch["domain"].tolist(), strict=True):
            tokens[domain] += int((labels[1:] != -100).sum())
    for place, (share, told) in enumerate(zip(shares, data.shares, strict=True)):
        assert abs(domains[place] - share * total) < 1
        assert (told.rows, told.tokens) == (domains[place], tokens[place])
        assert told.share == pytest.approx(domains[place] / total)
        assert told.token_share == pytest.approx(tokens[place] / sum(tokens.values()))
        assert told.passes == pytest.approx(told.rows / data.counts[place].train)
        assert told.passes >= 0.99
    # Every row is seen, and repeated ones about equally often.
    seen = Counter(tuple(ids) for ids in data.train["input_ids"])
    for place in range(len(sizes)):
        times = [seen[tuple(row["input_ids"])] for row in data.train if row["domain"] == place]
        assert max(times) - min(times) <= 1
    # Any stretch has the mix of the whole.
    window = np.array(data.train["domain"][:40])
    assert all(abs((window == place).mean() - share) <= 0.06 for place, share in enumerate(shares))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=5),
    weights=st.lists(st.integers(1, 20), min_size=5, max_size=5),
)
def test_an_epoch_shows_every_row_at_its_dataset_s_share(sizes, weights):
    shares = [weight / sum(weights[: len(sizes)]) for weight in weights[: len(sizes)]]
    counts = epoch_rows(sizes, shares)
    for count, size, share in zip(counts, sizes, shares, strict=True):
        assert abs(count - share * sum(counts)) < 1
        assert count >= size
    assert any(count <= size + 1 / share for count, size, share in zip(counts, sizes, shares, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": ["a=0.7", "c=0.3"]}, "mix names a, c, but the datasets are a, b"),
        ({"mix": ["a=0.7", "b=0.4"]}, "the shares of mix add up to 1.1; they must add up to 1"),
        ({"mix": ["a=0.5", "a=0.5"]}, "mix names a dataset twice"),
        ({"mix": ["a=1.5", "b=-0.5"]}, "it must be DATASET=SHARE"),
        ({"mix": ["a=0.99999", "b=0.00001"]}, "an epoch would show each of the 18 rows of 'a' 99,999 times"),
        ({"mix": ["a"]}, "it must be DATASET=SHARE"),
        ({"datasets": ["cmake"], "interleaved_sampling": True}, "interleaved_sampling has nothing to mix"),
        ({"datasets": []}, "datasets is empty"),
        ({"datasets": "cmake"}, "must be a list of strings"),
        ({"max_seq_length": 15}, "max_seq_length is 15; it must be at least 16"),
        ({"training_subset": 0}, "training_subset is 0; it must be a percentage above 0 and at most 100"),
        ({"eval_subset": 101}, "eval_subset is 101"),
        ({"overlong": "wrap"}, "overlong is 'wrap'; it must be 'cut' or 'drop'"),
        ({"loss_on": "prompt"}, "loss_on is 'prompt'; it must be 'response' or 'all'"),
        ({"columns": ["question"]}, "it must be ROLE=COLUMN, with a role of system, history, prompt"),
        ({"columns": ["question=x"]}, "it must be ROLE=COLUMN"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers is 0"),
    ],
)
def test_settings_that_break_a_rule_are_named(tmp_path, options, message):
    names = [numbered(tmp_path / f"{name}.jsonl", 20, name) for name in ("a", "b")]
    with pytest.raises(ValueError) as error:
        load_data(DataConfig(**{"datasets": names, **options}), PLAIN)
    assert message in str(error.value)


def test_all_settings_that_break_a_rule_are_told_at_once():
    with pytest.raises(ValueError) as error:
        DataConfig(max_seq_length=1, training_subset=0, overlong="x")
    assert all(name in str(error.value) for name in ("max_seq_length", "training_subset", "overlong"))


# The cache


def made(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "dylora-rows").glob("*.arrow")}


def dated(bos: str):
    """A tokenizer whose template writes its bos, and today's date."""
    tokenizer = byte_tokenizer(
        "{{ bos_token }}{{ strftime_now('%Y') }}{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    )
    tokenizer.bos_token = bos
    return tokenizer


def test_a_template_s_date_is_the_same_every_day(tmp_path):
    data = load([numbered(tmp_path / "mine.jsonl", 20, "cube")], dated("<b>"))
    assert all(dated("<b>").decode(ids).startswith("<b>2024cube") for ids in data.train["input_ids"])


def test_rows_are_cached_by_content_and_settings(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    path = Path(numbered(tmp_path / "mine.jsonl", 40, "cube"))
    first = as_rows(load([str(path)]))
    before = made(cache)
    assert len(before) == 1
    os.utime(path, (1, 1))  # touched, but the same
    assert as_rows(load([str(path)], seed=0, training_subset=100.0)) == first
    assert made(cache) == before
    calls = [
        lambda: load([str(path)], max_seq_length=32),
        lambda: load([str(path)], overlong="drop"),
        lambda: load([str(path)], loss_on="all"),
        lambda: load([str(path)], CHAT),
        lambda: load([str(path)], dated("one")),
        lambda: load([str(path)], dated("two")),
        lambda: load([str(path)], columns=["prompt=response", "response=prompt"]),
    ]
    for number, call in enumerate(calls, start=2):
        call()
        assert len(made(cache)) == number
    content = path.read_bytes()
    path.write_bytes(content.replace(b"cube 3?", b"sand 3?"))
    os.utime(path, (1, 1))  # same size, same time, other text
    assert any("sand 3?" in PLAIN.decode(row["input_ids"]) for row in as_rows(load([str(path)])))
    assert len(made(cache)) == len(calls) + 2


def test_rows_lie_in_files_not_in_memory(tmp_path):
    """A dataset larger than memory can be trained on."""
    data = load([numbered(tmp_path / "mine.jsonl", 40, "cube")])
    assert any("dylora-rows" in file["filename"] for file in data.train.cache_files)


# Samples


def test_sample_prompts_are_held_out_and_ready_to_generate_from(tmp_path):
    asked = numbered(tmp_path / "asked.jsonl", 30, "cube")
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": f"{i} " * 20} for i in range(30)])
    short = write_rows(tmp_path / "short.jsonl", [{"text": f"{i}"} for i in range(30)])
    data = load([asked, plain, short], CHAT)
    prompt = CHAT.decode(data.sample_prompts["asked"])
    assert prompt.endswith("<|im_start|>assistant\n")
    assert any(CHAT.decode(ids).startswith(prompt) for ids in data.evaluation["asked"]["input_ids"])
    for name, count in (("plain", 24), ("short", None)):
        ids = data.sample_prompts[name]
        starts = [row[:24] if count else row[:-1] for row in data.evaluation[name]["input_ids"]]
        assert ids in starts and CHAT.eos_token_id not in ids


# The machine's own text


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=30), limit=st.integers(1, 60))
def test_the_choice_is_as_even_as_the_documents_allow(sizes, limit):
    passages = [Passage(None, str(i), str(d)) for d, size in enumerate(sizes) for i in range(size)]
    chosen = choose_evenly(passages, limit)
    assert len(chosen) == min(limit, len(passages))
    assert chosen == [passage for passage in passages if passage in set(chosen)]
    taken = Counter(int(passage.document) for passage in chosen)
    most = max(taken.values())
    if len(sizes) <= limit:
        assert all(taken[d] == size or taken[d] >= most - 1 for d, size in enumerate(sizes))
    else:
        assert most == 1


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["\n", "\n\n", "a", "few words\n", "a line " * 9, "b" * 300]), max_size=40),
    size=st.integers(200, 500),
    minimum=st.sampled_from([1, 120]),
)
def test_pieces_lose_nothing_but_white_space(parts, size, minimum):
    text = "".join(parts)
    pieces = cut_pieces(text, size, minimum=minimum)
    if pieces:
        assert "".join("".join(pieces).split()) == "".join(text.split())
    else:
        assert len(text.strip()) < minimum
    assert all(len(piece.strip()) >= minimum for piece in pieces)
    assert all(len(piece) <= size + 2 * minimum for piece in pieces)


def test_notices_in_comments_are_left_out_of_headers_and_code_is_kept(tmp_path):
    from dylo_moe.data.sources.machine_text import file_pieces

    notice = "/* Copyright (c) 2001 Someone.\n * All rights reserved.\n */\n\n"
    code = "int copyright_year() {\n  return 2001;\n}\n" * 4
    (tmp_path / "a.h").write_text(notice + code)
    assert [passage.response for passage in file_pieces(tmp_path / "a.h", "a.h")] == [code.strip()]


def test_cpp_headers_hold_nothing_that_a_program_wrote():
    passages = list(read_cpp_headers())
    assert not [p.document for p in passages if "@generated" in p.response]
    assert not [p.document for p in passages if "generated/" in p.document or "/ATen/ops/" in p.document]
    assert not [p.document for p in passages if p.response.startswith("#if !defined(TORCH_STABLE_ONLY)")]


def test_python_functions_are_asked_for_by_their_docstring_and_answered_without_it():
    import ast

    from dylo_moe.data.sources.machine_text import read_machine_text

    for prompt, response, _ in read_machine_text("python_functions")[0]:
        (node,) = ast.parse(response).body
        head, _, docstring = prompt.partition("\n\n")
        assert head == f"Write the Python function `{node.name}`." and docstring
        assert docstring != ast.get_docstring(node)


@pytest.mark.end_to_end
def test_the_machine_s_text_suffices_with_the_real_tokenizer():
    from dylo_moe.base.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for max_seq_length in (128, 192):
        data = load(list(MACHINE_TEXT), tokenizer, max_seq_length=max_seq_length)
        for count in data.counts:
            assert count.train >= 80 and count.evaluation >= 8, count
            rows = [row for row in as_rows(data) if data.names[row["domain"]] == count.name]
            assert all(len(row["input_ids"]) <= max_seq_length for row in rows)
            ended = sum(row["labels"][-1] == tokenizer.eos_token_id for row in rows)
            assert ended > 0.5 * len(rows)  # a model must see ends to learn to stop
