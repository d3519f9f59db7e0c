"""Broken rows and files by the thousand: each is counted and has a message, and none ends in a traceback."""

from __future__ import annotations

import gzip
import json
import random
import re
import struct
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference.texts import CHAT, PLAIN

from dylo_moe.cli import main
from dylo_moe.data.config import DataConfig
from dylo_moe.data.encoding import text_format
from dylo_moe.data.loading import load_data
from dylo_moe.data.sources.examples import Fate
from dylo_moe.data.sources.locate import locate
from dylo_moe.data.sources.read import read_dataset
from dylo_moe.data.tokenized import tokenise_all

NUM_ROWS = 3000
GOOD = {"prompt": "a question", "response": "an answer"}


def broken_value(draw: random.Random):
    """No usable text, whatever its type."""
    return draw.choice(
        [
            None, True, False, 0, -1.5, 10**40, float("nan"), float("inf"), "", " ", "\n\t", "\u00a0", [], {}, [None],
            ["text"], {"text": "x"}, [[[]]], "\ud800", "x\udfff",
        ]
    )  # fmt: skip


def broken_row(draw: random.Random) -> bytes:
    """One line that is no row, each of another kind."""
    kind = draw.randrange(12)
    if kind < 3:
        return json.dumps({**GOOD, draw.choice(["prompt", "response"]): broken_value(draw)}).encode()
    if kind == 3:
        return json.dumps({draw.choice(["text", "content"]): broken_value(draw)}).encode()
    if kind == 4:  # cut off or with something behind
        line = json.dumps(GOOD).encode()
        return draw.choice([line[: draw.randrange(1, len(line) - 1)], line + b"}", b"{" + line, line + line])
    if kind == 5:  # bytes
        return bytes(draw.choice([0, 1, 0x80, 0xFF, 0xC0, 0xED, 65]) for _ in range(draw.randrange(1, 40))) + b"\xff"
    if kind == 6:
        return draw.choice([b"[]", b"3", b"null", b'"text"', b"[" * 50_000, b'{"a":' * 50_000, b"NaN", b"true", b"{}"])
    if kind == 7:
        return json.dumps({draw.choice(["prompt", "a", "x" * 500, "\n", "🙂"]): "text" for _ in range(3)}).encode()
    if kind == 8:
        speakers = ["user", "assistant", "system", "tool", "", None, 3, "USER "]
        turns = [{"role": draw.choice(speakers), "content": broken_value(draw)} for _ in range(draw.randrange(1, 5))]
        return json.dumps({"messages": turns}).encode()
    if kind == 9:
        turns = draw.choice(["text", 3, {}, None, [], [3], ["x"], [None], [{}], [{"from": "human"}], {"from": "gpt"}])
        return json.dumps({"conversations": turns}).encode()
    if kind == 10:
        return json.dumps(
            {"text": "a task", "code": "x = 1", "test_list": draw.choice([3, {"a": 1}, [3], [None], [""]])}
        ).encode()
    return json.dumps({**GOOD, "text": "and a text", "response": draw.choice([3, None, " "])}).encode()


def test_thousands_of_broken_rows_are_counted_one_by_one(tmp_path):
    draw = random.Random(0)
    lines, broken = [], 0
    for number in range(NUM_ROWS):
        line = broken_row(draw).replace(b"\n", b" ")
        assert line.strip()
        lines.append(line)
        broken += 1
        if number % 100 == 0:
            lines.append(json.dumps({"prompt": f"question {number}", "response": f"answer {number}"}).encode())
            lines.append(draw.choice([b"", b"   ", b"\r"]))  # no row at all
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b"\n".join(lines))
    for tokenizer in (CHAT, PLAIN):
        data = load_data(DataConfig(datasets=[str(path)], max_seq_length=64), tokenizer)
        (count,) = data.counts
        assert count.train + count.evaluation == NUM_ROWS // 100
        assert count.read == broken + NUM_ROWS // 100
        assert count.empty + count.malformed == broken, data.reasons
        reasons = data.reasons["broken"]
        assert sum(reason.num_rows for reason in reasons) == broken
        assert all(
            reason.text and "\n" not in reason.text and reason.first.startswith("broken.jsonl:") for reason in reasons
        )
        assert len({reason.text for reason in reasons}) >= 25
    by_fate = Counter(Fate(fate).name for fate in rows_of(path).fates.tolist())
    assert by_fate["EMPTY"] > 100 and by_fate["MALFORMED"] > 1000


def rows_of(path: Path):
    config = DataConfig(datasets=[str(path)], max_seq_length=64)
    (rows,) = tokenise_all([read_dataset(locate(str(path)), config)], text_format(CHAT), config, None)
    return rows


def test_rows_of_every_type_in_one_parquet_file_are_counted(tmp_path):
    """Columns of other types, and nulls inside them."""
    for number, (kind, values) in enumerate(
        [
            (pa.string(), ["a", None, "", " ", "b"]),
            (pa.int64(), [1, None, 2, 3, 4]),
            (pa.binary(), [b"a", None, b"\xff", b"", b"b"]),
            (pa.list_(pa.string()), [["a"], None, [], [None], ["b"]]),
            (pa.struct([("x", pa.int32())]), [{"x": 1}, None, {"x": None}, {"x": 2}, {"x": 3}]),
            (pa.float32(), [float("nan"), None, 1.0, 2.0, 3.0]),
            (pa.timestamp("us"), [0, None, 1, 2, 3]),
            (pa.large_string(), ["a", None, "", "b", "c"]),
            (pa.null(), [None] * 5),
        ]
    ):
        table = pa.table({"prompt": pa.array([f"q{i}" for i in range(5)]), "response": pa.array(values, kind)})
        path = tmp_path / f"table{number}.parquet"
        pq.write_table(table, path)
        config = DataConfig(datasets=[str(path)], max_seq_length=64)
        try:
            data = load_data(config, CHAT)
        except ValueError as error:
            assert re.search("has no usable row: response (is n|holds bytes)", str(error)) and "\n" not in str(error)
        else:
            (count,) = data.counts
            assert count.read == 5 == count.train + count.evaluation + count.empty + count.malformed


def mutated(draw: random.Random, content: bytes) -> bytes:
    """A file with some of its bytes changed, cut out, doubled, or with others between them."""
    content = bytearray(content)
    for _ in range(draw.randrange(1, 6)):
        place = draw.randrange(len(content) + 1)
        kind = draw.randrange(5)
        if kind == 0 and content:
            content[place % len(content)] = draw.randrange(256)
        elif kind == 1:
            del content[place : place + draw.randrange(1, 50)]
        elif kind == 2:
            content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 20)))
        elif kind == 3:
            content[place:place] = content[place : place + draw.randrange(1, 200)]
        else:
            del content[place:]
    return bytes(content)


def good_files() -> dict[str, bytes]:
    rows = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = b"prompt,response\n" + b"".join(f'"q, {i}","answer ""{i}"""\n'.encode() for i in range(12))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return {
        "mine.jsonl": lines,
        "mine.json": json.dumps(rows, indent=1).encode(),
        "mine.csv": table,
        "mine.tsv": table.replace(b",", b"\t"),
        "mine.jsonl.gz": gzip.compress(lines),
        "mine.parquet": sink.getvalue().to_pybytes(),
        "mine.txt": b"\n\n".join(f"Paragraph {i} of a text.".encode() for i in range(40)),
    }


@pytest.mark.parametrize("name", good_files())
def test_hundreds_of_broken_files_are_read_or_refused_in_one_line(tmp_path, name):
    draw = random.Random(name)
    outcomes = Counter()
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / name
        path.write_bytes(mutated(draw, good_files()[name]))
        try:
            data = load_data(DataConfig(datasets=[str(path)], max_seq_length=64), CHAT)
        except ValueError as error:
            outcomes["refused"] += 1
            assert "mine" in str(error) and "\n" not in str(error).strip()
        else:
            (count,) = data.counts
            gone = count.empty + count.malformed + count.duplicates
            assert count.read == count.train + count.evaluation + gone
            assert sum(reason.num_rows for reason in data.reasons["mine"]) >= count.empty + count.malformed
            outcomes["counted" if count.malformed + count.empty else "whole"] += 1
    assert outcomes["refused"] + outcomes["counted"] >= 10, outcomes


def array_of(*elements: bytes) -> bytes:
    return b"[" + b",".join(elements) + b"]"


ROWS = [json.dumps({"text": f"text {i}"}).encode() for i in range(6)]


@pytest.mark.parametrize(
    ("content", "good", "reason"),
    [
        (array_of(*ROWS), 6, None),
        (b"\xef\xbb\xbf \n" + array_of(*ROWS) + b"\n ", 6, None),
        (array_of(*ROWS[:3], b"3", b'"x"', b"null", *ROWS[3:]), 6, "not a JSON object"),
        (array_of(*ROWS[:3], b'{"text": "\xff"}', *ROWS[3:]), 6, "not UTF-8"),
        (array_of(*ROWS)[:-1], 6, "the array has no end; the file is not read any further"),
        (array_of(*ROWS)[:-9], 5, "not JSON; the file is not read any further"),
        (array_of(*ROWS[:3]) + b" [1]", 3, "text after the end of the array; the file is not read any further"),
        (b"[" + ROWS[0] + b"," + ROWS[1] + b" " + ROWS[2] + b"]", 2, "no comma after the previous element"),
        (array_of(*ROWS[:3], b"[" * 20_000, *ROWS[3:]), 3, "not JSON"),
    ],
)
def test_an_array_gives_what_stands_before_its_fault(tmp_path, content, good, reason):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    data = load_data(DataConfig(datasets=[str(path)], max_seq_length=64), CHAT)
    assert data.counts[0].train + data.counts[0].evaluation == good
    assert [reason in found.text for found in data.reasons["mine"]] == ([True] if reason else [])


def test_an_array_larger_than_what_is_read_at_once_is_whole(tmp_path, monkeypatch):
    """Elements over the border of two reads, in every place of the border."""
    from dylo_moe.data.sources import files

    elements = [{"text": f"ä{i}🙂" * 3, "more": [i, {"x": "]},{"}]} for i in range(40)]
    content = array_of(*(json.dumps(element, ensure_ascii=False).encode() for element in elements), b"17")
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    expected = [json.dumps(element, ensure_ascii=False) for element in json.loads(content)]
    for size in range(1, 60):
        monkeypatch.setattr(files, "CHUNK_BYTES", size)
        rows = list(files.raw_rows([("mine.json", str(path))], as_texts=False))
        assert [row["raw"].decode() for row in rows] == expected and not any(row["problem"] for row in rows)


def test_huge_lines_and_elements_cost_themselves_and_little_memory(tmp_path, monkeypatch):
    from dylo_moe.data.sources import files

    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1000)
    huge = json.dumps({"text": "x" * 5000}).encode()
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join([*ROWS[:3], huge, *ROWS[3:], huge]))
    rows = list(files.raw_rows([("mine.jsonl", str(tmp_path / "mine.jsonl"))], as_texts=False))
    assert [bool(row["problem"]) for row in rows] == [False] * 3 + [True] + [False] * 3 + [True]
    assert [row["place"] for row in rows] == [f"mine.jsonl:{number}" for number in range(1, 9)]
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    (tmp_path / "mine.json").write_bytes(array_of(*ROWS[:3], b'{"text": "' + b"x" * 5000, *ROWS[3:]))
    rows = list(files.raw_rows([("mine.json", str(tmp_path / "mine.json"))], as_texts=False))
    assert [bool(row["problem"]) for row in rows] == [False] * 3 + [True]


def test_a_text_file_over_many_parts_is_whole(tmp_path, monkeypatch):
    from dylo_moe.data.sources import files

    monkeypatch.setattr(files, "TEXT_BYTES", 50)
    text = "".join(f"line {i} of a long text\n" for i in range(100))
    (tmp_path / "long.txt").write_text(text)
    rows = list(files.raw_rows([("long.txt", str(tmp_path / "long.txt"))], as_texts=False))
    assert len(rows) > 20 and b"\n".join(row["raw"] for row in rows).decode() + "\n" == text


def test_a_file_s_name_may_be_no_text(tmp_path):
    name = b"caf\xe9\n.jsonl"
    with open(bytes(tmp_path) + b"/" + name, "wb") as file:
        file.write(b"\n".join([*ROWS, b"{"]))
    data = load_data(DataConfig(datasets=[str(tmp_path)]), CHAT)
    assert [(reason.text, reason.first) for reason in data.reasons[tmp_path.name]] == [
        ("not JSON: Expecting property name enclosed in double quotes", "caf\\udce9?.jsonl:7")
    ]


def test_files_that_are_no_files(tmp_path):
    (tmp_path / "mine.jsonl").mkdir()
    (tmp_path / "mine.jsonl" / "inner.bin").write_bytes(struct.pack("<4d", *range(4)))
    with pytest.raises(ValueError, match="has no usable row: not text"):
        load_data(DataConfig(datasets=[str(tmp_path / "mine.jsonl")]), CHAT)


def test_broken_data_on_the_command_line_is_one_line_and_status_2(tmp_path, capsys):
    """Nothing of it reaches the user as a traceback."""
    draw = random.Random(7)
    (tmp_path / "none.jsonl").write_bytes(b"\n".join(broken_row(draw).replace(b"\n", b" ") for _ in range(40)))
    (tmp_path / "zero.jsonl").write_bytes(b"")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    from reference.tiny import tiny_base

    tiny_base("llama", vocab_size=len(CHAT)).save_pretrained(tmp_path / "base")
    CHAT.save_pretrained(tmp_path / "base")
    for name, message in (
        ("none.jsonl", "has no usable row"),
        ("zero.jsonl", "has no row in"),
        ("broken.parquet", "is not a complete parquet file"),
        ("missing.jsonl", "there is no file or folder"),
    ):
        for command in (["data", "check"], ["data", "show"], ["train", "--datasets"]):
            words = [*command, str(tmp_path / name), "--model", str(tmp_path / "base")]
            if command == ["train", "--datasets"]:
                words += ["--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
            assert main(words) == 2, words
            shown = capsys.readouterr().err.strip().splitlines()
            assert message in shown[-1] and "Traceback" not in "\n".join(shown)
            assert not (tmp_path / "out").exists()
