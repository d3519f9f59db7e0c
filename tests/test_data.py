"""Laws of the data: nothing held out is trained on, the right tokens are trained, nothing is lost silently."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dylo_moe.data import (
    SOURCES,
    Collator,
    Example,
    encode,
    encode_prompt,
    load_data,
    read_source,
    text_format,
)
from dylo_moe.data.sources import MAX_EXAMPLES_PER_SOURCE, choose_evenly, cut_pieces

END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of help to everyone<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT_TEMPLATE = (  # like Gemma's: no system message, contents trimmed, and an end of turn that is not eos
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ message['role'] }}]{{ message['content'] | trim }}<turn_end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """All bytes and a few merges, so that a response can melt into the prompt before it; pad is eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("t", "h"), ("th", "e"), ("]", "]")]
    tokens = alphabet + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (END, "<|im_start|>", "<turn_end>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=template)


PLAIN, CHAT, STRICT = byte_tokenizer(), byte_tokenizer(CHAT_TEMPLATE), byte_tokenizer(STRICT_TEMPLATE)
KINDS = pytest.mark.parametrize(
    ("tokenizer", "end"), [(PLAIN, END), (CHAT, END), (STRICT, "<turn_end>")], ids=["plain", "chat", "strict"]
)


def trained(encoded) -> list[int]:
    return [label for label in encoded.labels if label != -100]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(path: Path, count: int, word: str) -> str:
    rows = [{"prompt": f"{word} {i}?", "response": f"{word} is {i * i}"} for i in range(count)]
    return write_rows(path, rows)


# One example


@KINDS
@settings(max_examples=150, deadline=None)
@given(prompt=st.text(min_size=1), response=st.text(min_size=1))
def test_trained_tokens_are_exactly_the_response_and_its_end(tokenizer, end, prompt, response):
    form = text_format(tokenizer)
    row = encode(form, Example(prompt, response, "d"), 10_000)
    assert tokenizer.decode(trained(row), clean_up_tokenization_spaces=False) == response + end
    count = len(trained(row))
    assert row.labels == [-100] * (len(row.labels) - count) + row.input_ids[-count:]
    assert row.input_ids[:-count] == row.prompt_ids == encode_prompt(form, prompt)


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1))
def test_every_token_of_a_plain_text_is_trained(text):
    for tokenizer in (PLAIN, CHAT, STRICT):
        row = encode(text_format(tokenizer), Example(None, text, "d"), 10_000)
        assert row.labels == row.input_ids
        assert tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False) == text + END


def test_a_response_that_melts_into_the_prompt_is_tokenised_apart():
    # "{prompt}\n\n" + "\nx" is one token of three newlines and an x: no prefix is the prompt
    row = encode(text_format(PLAIN), Example("a", "\nx", "d"), 100)
    assert PLAIN.convert_ids_to_tokens(row.input_ids) == ["a", "ĊĊ", "Ċ", "x", END]


def test_prompt_is_the_template_s_own_generation_prompt_with_the_shorter_system_message():
    user = {"role": "user", "content": "hi"}
    expected = CHAT.apply_chat_template(
        [{"role": "system", "content": ""}, user], add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(text_format(CHAT), "hi") == expected
    stock = CHAT.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert len(expected) < len(stock)
    strict = STRICT.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(text_format(STRICT), "hi") == strict


@KINDS
@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text("ab \n", min_size=1, max_size=60),
    response=st.text("ab \n", min_size=1, max_size=60),
    length=st.integers(16, 90),
)
def test_cutting_keeps_the_response_whole_where_it_fits(tokenizer, end, prompt, response, length):
    form = text_format(tokenizer)
    whole = encode(form, Example(prompt, response, "d"), 10_000)
    row = encode(form, Example(prompt, response, "d"), length)
    target = trained(whole)
    assert row.cut == (len(whole.input_ids) > length)
    assert len(row.input_ids) == len(row.labels) == min(length, len(whole.input_ids))
    if len(target) < length:  # the prompt loses its start
        assert trained(row) == target
        assert row.input_ids == whole.input_ids[-length:]
    else:  # the response loses its end, and the end token with it
        assert trained(row) == target[: len(trained(row))] != target
        assert len(trained(row)) >= length // 2
        shown = row.input_ids[: -len(trained(row))]
        assert shown == whole.prompt_ids[-len(shown) :] and shown


def test_text_that_holds_an_end_token_is_dropped():
    for form, end in ((text_format(PLAIN), END), (text_format(STRICT), "<turn_end>")):
        for example in (Example(None, f"a{end}b", "d"), Example("a", f"b{end}", "d"), Example(end, "b", "d")):
            assert encode(form, example, 100) is None
        assert encode(form, Example("a", "b", "d"), 100) is not None


def test_a_bos_that_the_tokenizer_adds_is_kept_unless_a_template_writes_its_own():
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.bos_token = "<|im_start|>"
    for prompt in (None, "q"):
        row = encode(text_format(tokenizer), Example(prompt, "a", "d"), 100)
        assert row.input_ids.count(bos) == 1 and row.input_ids[0] == bos
        assert tokenizer.decode(trained(row)[prompt is None :]) == "a" + END
    tokenizer.chat_template = STRICT_TEMPLATE
    assert bos not in encode_prompt(text_format(tokenizer), "q")


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        text_format(tokenizer)


# Batches


def test_padding_is_ignored_and_a_real_eos_is_not():
    eos = PLAIN.eos_token_id
    assert PLAIN.pad_token_id == eos
    form = text_format(PLAIN)
    rows = [
        {**encode(form, Example(None, text, "d"), 100)._asdict(), "domain": domain}
        for domain, text in enumerate(["the", "a longer text", "x"])
    ]
    batch = Collator(PLAIN)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == (3, longest) and batch["domain"].tolist() == [0, 1, 2]
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][index].tolist() == row["input_ids"] + [eos] * (longest - length)
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (longest - length)
        assert batch["labels"][index].tolist() == row["labels"] + [-100] * (longest - length)
        assert batch["labels"][index, length - 1] == eos and batch["attention_mask"][index, length - 1] == 1


def test_collator_refuses_a_tokenizer_that_cannot_pad():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an eos token"):
        Collator(tokenizer)


# Sources


def test_every_malformed_line_is_counted_and_the_first_is_told(tmp_path):
    bad = [
        b"{not json",
        b"[1, 2]",
        b'"text"',
        b"{}",
        b'{"prompt": "a"}',
        b'{"response": "a"}',
        b'{"prompt": "", "response": "a"}',
        b'{"prompt": "a", "response": " \\n"}',
        b'{"text": 3}',
        b'{"text": null}',
        b'{"text": "a", "response": "b"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"[" * 100_000,
    ]
    good = [b'{"text": "a\xe2\x80\xa8b"}', b'{"prompt": "p", "response": "r", "source": 1}\r']
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([good[0], b"", *bad, good[1], b""]))
    reading = read_source(str(path))
    assert reading.name == "mine" and reading.malformed == len(bad)
    assert reading.first_malformed == "mine.jsonl:3: not JSON"
    assert reading.examples == [
        Example(None, "a\u2028b", "mine.jsonl:1"),
        Example("p", "r", f"mine.jsonl:{3 + len(bad)}"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "not an object"),
        ('{"prompt": "a"}', "no response"),
        ('{"prompt": 1, "response": "a"}', "prompt is not a string"),
        ('{"text": " "}', "text is empty"),
        ('{"text": "a", "prompt": "b"}', "both text and prompt or response"),
        ('{"text": "\\udfff"}', "text holds half a surrogate pair"),
    ],
)
def test_a_file_without_a_usable_row_names_file_rule_and_reason(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl' has no usable row: each line must") as error:
        read_source(str(path))
    assert f"bad.jsonl:2: {reason}" in str(error.value)


def test_malformed_lines_reach_the_log_and_the_counts(tmp_path, caplog):
    path = tmp_path / "mine.jsonl"
    numbered(path, 20, "cube")
    path.write_text(path.read_text() + "oops\n")
    assert load_data([str(path)], PLAIN, max_seq_length=64).counts[0].malformed == 1
    assert "mine.jsonl:21: not JSON" in caplog.text


@pytest.mark.parametrize(
    ("name", "nearest"), [("cpp_header", "cpp_headers"), ("Python", "python_functions"), ("CMAKE", "cmake")]
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_known(name, nearest):
    with pytest.raises(ValueError, match=f"unknown dataset '{name}'; the nearest known one is '{nearest}'") as e:
        read_source(name)
    assert all(known in str(e.value) for known in SOURCES)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=30), limit=st.integers(1, 60))
def test_the_choice_is_as_even_as_the_documents_allow(sizes, limit):
    examples = [Example(None, str(i), str(d)) for d, size in enumerate(sizes) for i in range(size)]
    chosen = choose_evenly(examples, limit)
    assert len(chosen) == min(limit, len(examples))
    assert chosen == [example for example in examples if example in set(chosen)]
    taken = Counter(int(example.document) for example in chosen)
    most = max(taken.values())
    if len(sizes) <= limit:
        assert all(taken[d] == size or taken[d] >= most - 1 for d, size in enumerate(sizes))
    else:
        assert most == 1


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["\n", "\n\n", "a", "few words\n", "a line " * 9, "b" * 300]), max_size=40),
    size=st.integers(200, 500),
)
def test_pieces_lose_nothing_but_white_space(parts, size):
    text = "".join(parts)
    pieces = cut_pieces(text, size)
    if pieces:
        assert "".join("".join(pieces).split()) == "".join(text.split())
    else:
        assert len(text.strip()) < 120
    assert all(len(piece.strip()) >= 120 for piece in pieces)
    assert all(len(piece) <= size + 2 * 120 for piece in pieces)


def test_notices_in_comments_are_no_pieces_and_code_is_kept():
    notice = "/* Copyright (c) 2001 Someone.\n * All rights reserved.\n */\n\n"
    code = "int copyright_year() {\n  return 2001;\n}\n" * 4
    assert cut_pieces(notice + code) == [code.strip()]


# Mixing


def as_rows(data) -> list[dict]:
    return [*data.train, *(row for name in data.names for row in data.evaluation[name])]


def test_no_held_out_text_is_trained_on_and_every_example_is_accounted_for(tmp_path):
    rows = [{"text": f"text {i % 70}"} for i in range(100)]  # 30 repeated
    rows += [{"text": f"stop {END}"}, {"text": "x" * 100}, {"text": "x" * 101}]  # dropped, cut, equal once cut
    one = write_rows(tmp_path / "one.jsonl", rows)
    two = write_rows(tmp_path / "two.jsonl", [{"text": f"text {i}"} for i in range(60, 100)])  # 10 from one
    data = load_data([one, two], PLAIN, max_seq_length=32)
    first, second = data.counts
    assert (first.examples, first.duplicates, first.dropped, first.cut) == (103, 31, 1, 1)
    assert (second.examples, second.duplicates, second.dropped, second.cut) == (40, 10, 0, 0)
    for count in data.counts:
        assert count.examples == count.train + count.evaluation + count.dropped + count.duplicates
        assert count.evaluation == round(0.1 * (count.train + count.evaluation))
        assert count.evaluation == len(data.evaluation[count.name])
    texts = [tuple(row["input_ids"]) for row in as_rows(data)]
    assert len(set(texts)) == len(texts) == 71 + 30
    assert list(data.train["domain"]) not in (sorted(data.train["domain"]), sorted(data.train["domain"])[::-1])
    domains = Counter(data.train["domain"])
    assert [domains[0], domains[1]] == [first.train, second.train]
    assert {row["domain"] for row in data.evaluation["two"]} == {1}


def test_no_held_out_document_gives_a_training_row(monkeypatch):
    from dylo_moe.data import sources

    def read():
        for document in range(30):
            for part in range(1 + document % 7):
                yield Example(None, f"{document}:{part}", f"file{document}")

    source = sources.Source("files", "made in a test", "none", read)
    monkeypatch.setitem(sources.SOURCES, "files", source)
    splits = set()
    for seed in range(5):
        data = load_data(["files"], PLAIN, max_seq_length=32, seed=seed)
        decoded = [[PLAIN.decode(ids) for ids in part["input_ids"]] for part in (data.train, data.evaluation["files"])]
        train, held_out = ({text.split(":")[0] for text in texts} for texts in decoded)
        assert train.isdisjoint(held_out) and len(train | held_out) == 30
        assert 0 < data.counts[0].evaluation <= round(0.1 * data.counts[0].examples)
        splits.add(frozenset(held_out))
    assert len(splits) > 1


def test_two_documents_can_be_split_and_one_cannot(tmp_path):
    data = load_data([numbered(tmp_path / "two.jsonl", 2, "cube")], PLAIN, max_seq_length=64)
    assert (data.counts[0].train, data.counts[0].evaluation) == (1, 1)
    with pytest.raises(ValueError, match="'single' has usable rows from 1 document"):
        load_data([numbered(tmp_path / "single.jsonl", 1, "cube")], PLAIN, max_seq_length=64)


def test_subsets_are_shares_of_each_dataset_and_lie_inside_each_other(tmp_path):
    names = [numbered(tmp_path / "a.jsonl", 200, "cube"), numbered(tmp_path / "b.jsonl", 100, "square")]
    parts = {
        percent: load_data(names, PLAIN, max_seq_length=64, training_subset=percent, eval_subset=percent)
        for percent in (0.01, 10, 50, 100)
    }
    assert [count.train for count in parts[100].counts] == [180, 90]
    assert [count.train for count in parts[50].counts] == [90, 45]
    assert [count.evaluation for count in parts[50].counts] == [10, 5]
    assert [count.train for count in parts[0.01].counts] == [1, 1]
    every, half = (list(parts[percent].evaluation["a"]["input_ids"]) for percent in (100, 50))
    places = [every.index(ids) for ids in half]
    assert places == sorted(places) and places[-1] - places[0] >= len(places)  # spread, not the first ones
    smaller: set[tuple[int, ...]] = set()
    for percent in sorted(parts):
        texts = {tuple(row["input_ids"]) for row in as_rows(parts[percent])}
        assert smaller < texts
        smaller = texts


def test_sample_prompts_are_held_out_and_ready_to_generate_from(tmp_path):
    asked = numbered(tmp_path / "asked.jsonl", 30, "cube")
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": f"{i} " * 20} for i in range(30)])
    short = write_rows(tmp_path / "short.jsonl", [{"text": f"{i}"} for i in range(30)])
    data = load_data([asked, plain, short], CHAT, max_seq_length=64)
    prompt = CHAT.decode(data.sample_prompts["asked"])
    assert prompt.endswith("<|im_start|>assistant\n")
    assert any(CHAT.decode(ids).startswith(prompt) for ids in data.evaluation["asked"]["input_ids"])
    for name, count in (("plain", 24), ("short", None)):
        ids = data.sample_prompts[name]
        starts = [row[:24] if count else row[:-1] for row in data.evaluation[name]["input_ids"]]
        assert ids in starts and CHAT.eos_token_id not in ids


def test_all_broken_rules_are_told_at_once(tmp_path):
    path = numbered(tmp_path / "cmake.jsonl", 5, "cube")
    with pytest.raises(ValueError) as error:
        load_data(
            ["cmake", path, "pyton", "no/such.jsonl"], PLAIN, max_seq_length=15, training_subset=0, eval_subset=101
        )
    for part in (
        "unknown dataset 'pyton'",
        "no file 'no/such.jsonl'",
        "names holds 'cmake' 2 times",
        "max_seq_length is 15; it must be at least 16",
        "training_subset is 0; it must be a percentage above 0 and at most 100",
        "eval_subset is 101; it must",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="names is empty"):
        load_data([], PLAIN, max_seq_length=64)
    with pytest.raises(ValueError, match="give a list of names"):
        load_data("cmake", PLAIN, max_seq_length=64)


DIGEST = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[1])
import test_data
from dylo_moe.data import load_data
data = load_data(["english_reference", "cmake", sys.argv[2]], test_data.CHAT, max_seq_length=64, seed=3)
print(hashlib.sha256(json.dumps([test_data.as_rows(data), data.sample_prompts]).encode()).hexdigest())
"""


def test_the_same_seed_gives_the_same_rows_in_another_process(tmp_path):
    path = numbered(tmp_path / "mine.jsonl", 50, "cube")
    root = Path(__file__).parent
    digests = [
        subprocess.run(
            [sys.executable, "-c", DIGEST, str(root), path],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root.parent)},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert digests[0] == digests[1] and len(digests[0].strip()) == 64


def test_another_seed_gives_another_order_and_split(tmp_path):
    path = numbered(tmp_path / "mine.jsonl", 50, "cube")
    one, other = (load_data([path], PLAIN, max_seq_length=64, seed=seed) for seed in (1, 2))
    assert one.train["input_ids"] != other.train["input_ids"]
    assert one.evaluation["mine"]["input_ids"] != other.evaluation["mine"]["input_ids"]


# What every machine has


@pytest.mark.parametrize("name", SOURCES)
def test_built_in_sources_are_bounded_relative_and_the_same_twice(name):
    reading = read_source(name)
    assert 92 <= len(reading.examples) <= MAX_EXAMPLES_PER_SOURCE and reading.malformed == 0
    assert all(not example.document.startswith(("/", "..")) for example in reading.examples)
    assert read_source(name) == reading
    if name != "python_functions":
        assert all(example.prompt is None for example in reading.examples)
        return
    for prompt, response, _ in reading.examples:
        (node,) = ast.parse(response).body
        head, _, docstring = prompt.partition("\n\n")
        assert head == f"Write the Python function `{node.name}`." and docstring
        assert docstring != ast.get_docstring(node)


def test_cpp_headers_hold_nothing_that_a_program_wrote():
    examples = list(SOURCES["cpp_headers"].read())
    assert not [e.document for e in examples if "@generated" in e.response]
    assert not [e.document for e in examples if "generated/" in e.document or "/ATen/ops/" in e.document]
    assert not [e.document for e in examples if e.response.startswith("#if !defined(TORCH_STABLE_ONLY)")]


@pytest.mark.end_to_end
def test_built_in_sources_suffice_with_the_real_tokenizer():
    from dylo_moe.base import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for max_seq_length in (128, 192):
        data = load_data(list(SOURCES), tokenizer, max_seq_length=max_seq_length)
        for count in data.counts:
            assert count.train >= 80 and count.evaluation >= 8, count
            rows = [row for row in as_rows(data) if data.names[row["domain"]] == count.name]
            assert all(len(row["input_ids"]) <= max_seq_length for row in rows)
            ended = sum(row["labels"][-1] == tokenizer.eos_token_id for row in rows)
            assert ended > 0.5 * len(rows)  # a model must see ends to learn to stop
