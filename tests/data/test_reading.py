"""Where rows come from: mirrors in the hub's own schemas, files and folders of one's own, and the messages without."""

import gzip
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference.mirrors import ROWS, WRITERS, answer, task, write_mirror
from reference.paths import ROOT
from reference.texts import CHAT, END, write_rows

from dylo_moe.data.config import DataConfig
from dylo_moe.data.loading import load_data
from dylo_moe.data.sources import read as reading
from dylo_moe.data.sources.catalog import CATALOG, MACHINE_TEXT
from dylo_moe.data.sources.formats import NOT_TEXT, NOT_UTF8
from dylo_moe.data.sources.locate import locate, locate_all
from dylo_moe.data.sources.machine_text import MAX_PASSAGES
from dylo_moe.data.sources.read import read_dataset


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture
def _no_hub(monkeypatch):
    monkeypatch.setattr("dylo_moe.data.sources.hub.no_way_to_hub", lambda: True)


def texts(rows) -> list[str]:
    return [CHAT.decode(ids) for ids in rows["input_ids"]]


# The catalog


def test_the_mirrors_are_of_all_hub_datasets():
    assert set(WRITERS) == {name for name, source in CATALOG.items() if source.hub_id}


@pytest.mark.parametrize("name", [name for name, source in CATALOG.items() if source.hub_id and source.for_training])
def test_a_hub_dataset_is_read_from_its_mirror(mirror, name):
    data = load_data(DataConfig(datasets=[name], data_dir=str(mirror), max_seq_length=400), CHAT)
    (count,) = data.counts
    assert data.origins[name] == f"mirror {mirror / name}"
    assert (count.duplicates, count.empty, count.malformed) == (1, 1, 0)
    found = [*texts(data.train), *texts(data.evaluation[name])]
    if name == "mbpp":
        assert (count.train, count.evaluation, count.left_out) == (30, 8, 23)
    else:
        assert (count.train + count.evaluation, count.evaluation, count.left_out) == (ROWS, 3, 0)
    (reason,) = data.reasons[name]
    assert reason.num_rows == 1 and "is empty" in reason.text and reason.first
    kind = {"code_alpaca": "alpaca", "evol_instruct": "evol", "code_feedback": "feedback", "python_codes_25k": "codes"}
    kind |= {"python_code_instructions_18k": "instructions", "python_code_23k_sharegpt": "share", "mbpp": "mbpp"}
    first = 601 if name == "mbpp" else 0
    (whole,) = [text for text in found if f" {kind[name]} task {first + 1}: " in text.replace("\n", " ")]
    assert task(first + 1, kind[name]) in whole
    assert whole.rstrip().endswith(answer(first + 1, kind[name]) + END)
    assert not any("Below is" in text for text in found)


def test_a_conversation_trains_every_answer(mirror):
    data = load_data(DataConfig(datasets=["python_code_23k_sharegpt"], data_dir=str(mirror), max_seq_length=400), CHAT)
    rows = [*data.train, *data.evaluation["python_code_23k_sharegpt"]]
    trained = [CHAT.decode([label for label in row["labels"] if label != -100]) for row in rows]
    assert answer(3, "share") + END + "Because it was asked for, 3 times." + END in trained


def test_alpaca_s_input_follows_the_instruction(mirror):
    data = load_data(DataConfig(datasets=["code_alpaca"], data_dir=str(mirror), max_seq_length=400), CHAT)
    found = "".join([*texts(data.train), *texts(data.evaluation["code_alpaca"])])
    assert f"{task(3, 'alpaca')}\n\n[3]{END}" in found
    assert f"{task(4, 'alpaca')}{END}" in found


def test_mbpp_trains_its_train_split_and_judges_by_its_validation_split_and_reads_no_other(mirror):
    data = load_data(DataConfig(datasets=["mbpp"], data_dir=str(mirror), max_seq_length=500), CHAT)
    for rows, low, high in ((data.train, 601, 631), (data.evaluation["mbpp"], 511, 519)):
        found = texts(rows)
        assert sorted(int(re.search(r"task (\d+):", text)[1]) for text in found) == list(range(low, high))
        assert all("full: mbpp" in text and "The code must pass:\nassert mbpp_" in text for text in found)
        assert not any("\r" in text for text in found)


def test_mbpp_without_its_published_splits_is_refused(tmp_path, mirror):
    """A single file of all tasks would train the test split."""
    rows = pq.read_table(mirror / "mbpp" / "full" / "test-00000-of-00001.parquet")
    (tmp_path / "mbpp").mkdir()
    pq.write_table(rows, tmp_path / "mbpp" / "mbpp.parquet")
    with pytest.raises(ValueError, match=r"'mbpp' .* has no split validation; it has train"):
        load_data(DataConfig(datasets=["mbpp"], data_dir=str(tmp_path)), CHAT)


def test_humaneval_is_refused_for_training(mirror):
    with pytest.raises(ValueError, match="humaneval is for evaluation only, and never trained on"):
        load_data(DataConfig(datasets=["mbpp", "humaneval"], data_dir=str(mirror)), CHAT)


@pytest.mark.parametrize("name", ["evol_instruct", "python_code_23k_sharegpt"])
def test_a_non_commercial_licence_is_told_when_it_is_used(mirror, name):
    notes = load_data(DataConfig(datasets=[name], data_dir=str(mirror)), CHAT).notes
    assert any(name in note and CATALOG[name].licence in note and "not for commercial use" in note for note in notes)
    assert not load_data(DataConfig(datasets=["code_alpaca"], data_dir=str(mirror)), CHAT).notes


def test_the_docs_show_the_table_that_the_code_has():
    """Else docs and code would drift apart."""
    docs = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    for source in CATALOG.values():
        (line,) = [line for line in docs.splitlines() if line.startswith(f"| `{source.name}` |")]
        for fact in (source.licence, source.size, source.format, source.origin, (source.revision or "")[:10]):
            assert fact in line, (source.name, fact)


def test_every_pinned_revision_is_a_commit():
    assert all(re.fullmatch(r"[0-9a-f]{40}", source.revision) for source in CATALOG.values() if source.hub_id)


# Without hub and mirror


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize("name", ["mbpp", "code_feedback@main", "someone/something"])
def test_without_hub_and_mirror_one_message_says_the_three_ways(name, tmp_path):
    for config in (DataConfig(datasets=[name]), DataConfig(datasets=[name], data_dir=str(tmp_path))):
        with pytest.raises(ValueError) as error:
            load_data(config, CHAT)
        message = str(error.value)
        assert "\n" not in message
        for part in (
            "cannot be read: the hub cannot be reached",
            "(1) reach the hub",
            "(2) put its files into",
            "(3) give",
        ):
            assert part in message
        assert ("has no folder" in message) == (config.data_dir is not None)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    path = write_rows(tmp_path / "cmake.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(ValueError) as error:
        load_data(
            DataConfig(
                datasets=["cmake", path, "pyton", "no/such.jsonl", "./nowhere", "cmake@main"], data_dir="missing_folder"
            ),
            CHAT,
        )
    for part in (
        "unknown dataset 'pyton'; the nearest known one is 'python_",
        "there is no file or folder 'no/such.jsonl'",
        "there is no file or folder 'nowhere'",
        "datasets holds 'cmake' 2 times",
        "'cmake' is text of this machine and has no revision",
        "data_dir is 'missing_folder'; there is no such folder",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "nearest"), [("cpp_header", "cpp_headers"), ("Python", "python_functions"), ("CMAKE", "cmake")]
)
def test_an_unknown_name_is_answered_with_the_nearest_and_all_known(name, nearest):
    with pytest.raises(ValueError, match=f"unknown dataset '{name}'; the nearest known one is '{nearest}'") as e:
        locate(name)
    assert all(known in str(e.value) for known in CATALOG)


def test_no_name_is_offered_that_is_not_near_or_not_trained_on():
    for name, near in (("humaneva", "humaneval"), ("nope", None)):
        with pytest.raises(ValueError, match=f"unknown dataset '{name}'; " + ("the nearest" if near else "known")) as e:
            locate(name)
        assert near is None or f"is {near!r}" in str(e.value)
        with pytest.raises(ValueError, match=f"unknown dataset '{name}'; known are") as e:
            load_data(DataConfig(datasets=[name]), CHAT)
        assert "humaneval" not in str(e.value)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a/b", ("b", "a/b", None, None)),
        ("a/b.c:full@v1", ("b.c", "a/b.c", "full", "v1")),
        ("mbpp", ("mbpp", "google-research-datasets/mbpp", "full", CATALOG["mbpp"].revision)),
        ("mbpp@abc", ("mbpp", "google-research-datasets/mbpp", "full", "abc")),
    ],
)
def test_names_on_the_hub(argument, expected):
    place = locate(argument)
    assert (place.name, place.hub_id, place.config, place.revision) == expected


# Files and folders of one's own


EXCHANGES = [{"demand": f"What is {i}?", "remedy": f"It is {i}."} for i in range(12)]


def write_as(path: Path, rows: list[dict]) -> Path:
    kind = "".join(path.suffixes)
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif kind == ".json":
        path.write_text("\ufeff \n" + json.dumps(rows, indent=2) + "\n")
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "csv", "parquet"])
def test_any_file_is_read_with_columns_of_ones_own(tmp_path, kind):
    path = write_as(tmp_path / f"mine.{kind}", EXCHANGES)
    config = DataConfig(datasets=[str(path)], columns=["prompt=demand,response=remedy"])
    data = load_data(config, CHAT)
    assert data.names == ["mine"] and data.counts[0].read == 12 and not data.reasons["mine"]
    found = "".join([*texts(data.train), *texts(data.evaluation["mine"])])
    assert all(f"What is {i}?{END}" in found and f"It is {i}.{END}" in found for i in range(12))
    with pytest.raises(ValueError, match=r"demand, remedy"):
        load_data(DataConfig(datasets=[str(path)]), CHAT)


def test_columns_can_be_told_for_one_dataset(tmp_path):
    one = write_as(tmp_path / "one.jsonl", EXCHANGES)
    two = write_as(tmp_path / "two.jsonl", [{"frage": f"Was ist {i}?", "antwort": f"{i}"} for i in range(12)])
    columns = ["one.prompt=demand", "one.response=remedy", "two.prompt=frage", "two.response=antwort"]
    data = load_data(DataConfig(datasets=[str(one), str(two)], columns=columns), CHAT)
    assert [count.read - count.train - count.evaluation for count in data.counts] == [0, 0]


def test_columns_of_one_dataset_win_over_those_of_all(tmp_path):
    rows = [{"a": f"a {i}", "b": f"b {i}", "response": "x"} for i in range(6)]
    paths = [str(write_as(tmp_path / f"{name}.jsonl", rows)) for name in ("one", "two")]
    for columns in (
        ["one.prompt=b", "prompt=a", "response=response"],
        ["response=response", "prompt=a", "one.prompt=b"],
    ):
        data = load_data(DataConfig(datasets=paths, columns=columns), CHAT)
        found = ["".join([*texts(data.evaluation[name])]) for name in data.names]
        assert "user\nb " in found[0] and "user\na " in found[1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt=demand,response=remedy,input=typo"], "has no column typo; it has demand, remedy"),
        (["prompt=demand,prompt=remedy,response=remedy"], "columns gives prompt twice"),
        (["prompt=demand"], "columns of 'mine': the roles prompt do not form a format"),
        (["other.prompt=demand"], "columns is for 'other', which is not among the datasets (mine, cmake)"),
        (["cmake.text=x"], "columns cannot apply to 'cmake'"),
        (["prompt=nowhere,response=remedy"], "has no column nowhere; it has demand, remedy"),
    ],
)
def test_columns_that_cannot_apply_are_refused(tmp_path, columns, message):
    for kind in ("parquet", "jsonl"):
        path = write_as(tmp_path / f"mine.{kind}", EXCHANGES)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_data(DataConfig(datasets=[str(path), "cmake"], columns=columns), CHAT)


def test_columns_without_a_dataset_of_ones_own_are_refused():
    with pytest.raises(ValueError, match="columns cannot apply: the columns of named datasets are known"):
        load_data(DataConfig(datasets=["cmake"], columns=["text=x"]), CHAT)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_folder_s_splits_are_told_by_its_files_names(tmp_path, kind):
    for split, numbers in (("train", range(8)), ("val", range(8, 11)), ("test", range(11, 16))):
        rows = [{"text": f"text {i} of {split}"} for i in numbers]
        write_as(tmp_path / f"{split}-00000-of-00001.{kind}", rows)
    (tmp_path / "README.md").write_text("text of a readme")
    data = load_data(DataConfig(datasets=[str(tmp_path)]), CHAT)
    (count,) = data.counts
    assert (count.train, count.evaluation, count.left_out) == (8, 3, 5)
    assert all("of val" in text for text in texts(data.evaluation[tmp_path.name]))
    assert all("of train" in text for text in texts(data.train))


def test_a_folder_of_sources_is_cut_into_rows_and_nothing_of_it_is_lost(tmp_path):
    paragraph = "def f_{0}(x):\n    return x + {0}\n\n"
    (tmp_path / "pkg" / ".git").mkdir(parents=True)
    (tmp_path / "pkg" / ".git" / "config").write_text("hidden")
    (tmp_path / "pkg" / "__pycache__").mkdir()
    (tmp_path / "pkg" / "__pycache__" / "x.pyc").write_bytes(b"\0\0")
    (tmp_path / "pkg" / "package.json").write_text('{"name": "a source too"}')
    (tmp_path / "pkg" / "logo.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "pkg" / "latin.py").write_bytes("# caf\xe9".encode("latin-1"))
    (tmp_path / "pkg" / "empty.py").write_text("\n")
    for file in range(6):
        content = "".join(paragraph.format(100 * file + i) for i in range(20))
        (tmp_path / "pkg" / f"m{file}.py").write_text(content)
    data = load_data(DataConfig(datasets=[str(tmp_path / "pkg")], max_seq_length=64), CHAT)
    (count,) = data.counts
    assert (count.malformed, count.empty, count.cut_response, count.documents) == (2, 1, 0, 7)
    assert {(reason.text, reason.first) for reason in data.reasons["pkg"]} == {
        (NOT_TEXT, "logo.png"),
        (NOT_UTF8, "latin.py:1"),
        ("the file is empty", "empty.py"),
    }
    found = "".join([*texts(data.train), *texts(data.evaluation["pkg"])])
    assert all(f"f_{100 * file + i}(x)" in found for file in range(6) for i in range(20))
    assert "a source too" in found and "hidden" not in found


def test_a_file_of_sources_is_on_one_side_of_the_split(tmp_path):
    for file in range(6):
        content = "".join(f"def g{file}_{i}(x):\n    return x + {i}\n\n" for i in range(20))
        (tmp_path / f"m{file}.py").write_text(content)
    data = load_data(DataConfig(datasets=[str(tmp_path)], max_seq_length=64), CHAT)
    train, held = (
        set(re.findall(r"def g(\d)_", "".join(texts(rows)))) for rows in (data.train, data.evaluation[tmp_path.name])
    )
    assert train and held and train.isdisjoint(held)
    assert train.isdisjoint(held)


def test_a_single_text_is_split_by_its_pieces_and_says_so(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Chapter {i}. " + f"Word{i} " * 10 for i in range(40)))
    data = load_data(DataConfig(datasets=[str(path)], max_seq_length=128), CHAT)
    assert data.counts[0].evaluation >= 1
    assert any("book is one document" in note for note in data.notes)


def rows_in(kind):
    """Thirty questions and answers with accents, as a file of this kind writes them."""
    rows = [{"prompt": f"café {i}", "response": f"déjà vu {i}"} for i in range(30)]
    if kind == "json":
        return json.dumps(rows, ensure_ascii=False)
    if kind == "jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    sign = {"csv": ",", "tsv": "\t", "txt": " "}[kind]
    return "\n".join([f"prompt{sign}response", *(sign.join(row.values()) for row in rows)])


@pytest.mark.parametrize(
    ("kind", "first"), [("csv", ":2"), ("tsv", ":2"), ("jsonl", ":1"), ("json", "[0]"), ("txt", ":2")]
)
def test_a_file_in_another_encoding_is_told_so_with_the_line_and_how_to_convert_it(tmp_path, kind, first):
    """A CSV of Excel was told that it held half a surrogate pair."""
    assert "iconv -f WINDOWS-1252 -t UTF-8" in NOT_UTF8
    path, config = tmp_path / f"rows.{kind}", DataConfig(datasets=[str(tmp_path / f"rows.{kind}")], max_seq_length=64)
    for encoding, place, reason in (
        (
            "cp1252",
            f"rows.{kind}{first}",
            "not UTF-8, as every text must be; convert its file: iconv -f WINDOWS-1252 -t UTF-8",
        ),
        *(
            (encoding, f"rows.{kind}:1", "UTF-16, not UTF-8, as every text must be; convert the file: iconv -f UTF-16")
            for encoding in ("utf-16", "utf-16-le", "utf-16-be")
        ),
    ):
        path.write_bytes(rows_in(kind).encode(encoding))
        with pytest.raises(ValueError, match=re.escape(f"(file {path}) has no usable row: {reason}")) as raised:
            load_data(config, CHAT)
        assert str(raised.value).endswith(f"first {place})")
    path.write_bytes(rows_in(kind).encode("utf-8-sig"))
    assert load_data(config, CHAT).counts[0].malformed == 0


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "rows.csv",
            ("prompt,response\n" + "a,b\n" * 9 + "".join(f"caf\xe9 {i},b\n" for i in range(8))).encode("latin-1"),
            f"1 is usable ({NOT_UTF8} (8 rows, first rows.csv:11); 8 that repeat another row)",
        ),
        (
            "rows.jsonl",
            b'{"text": "a"}\n{"text" "b"}\n',
            "1 is usable (not JSON: Expecting ':' delimiter (1 row, first rows.jsonl:2))",
        ),
        ("rows.xlsx", b"PK\x03\x04 a workbook", f"no usable row: {NOT_TEXT} (1 row, first rows.xlsx)"),
    ],
)
def test_too_few_usable_rows_are_told_with_what_is_wrong_and_where(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(told)):
        load_data(DataConfig(datasets=[str(tmp_path / name)], max_seq_length=64), CHAT)


def test_one_line_in_another_encoding_costs_itself_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(rows_in("csv").encode().replace("café 7".encode(), "café 7".encode("cp1252")))
    data = load_data(DataConfig(datasets=[str(path)], max_seq_length=64), CHAT)
    [reason] = data.reasons["rows"]
    assert (reason.num_rows, reason.text, reason.first, data.counts[0].read) == (1, NOT_UTF8, "rows.csv:9", 30)


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_nul_byte_in_a_table_costs_its_row_and_is_told(tmp_path, kind):
    """It was trained."""
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(rows_in(kind).encode().replace("café 7".encode(), b"caf\0 7"))
    data = load_data(DataConfig(datasets=[str(path)], max_seq_length=64), CHAT)
    [reason] = data.reasons["rows"]
    assert (reason.text, reason.first) == ("it holds a NUL byte, which no text has", f"rows.{kind}:9")


def test_a_header_in_another_encoding_names_no_column(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(rows_in("csv").replace("prompt", "prêmpt").encode("cp1252"))
    with pytest.raises(ValueError, match=r"not UTF-8, .* \(1 row, first rows.csv:1\)"):
        load_data(DataConfig(datasets=[str(path)]), CHAT)


def test_strings_of_parquet_that_are_not_utf8_are_told_so(tmp_path):
    """Neither the writer nor the reader of a parquet file checks them."""
    texts = pa.array([f"caf{'é' if i > 3 else 'e'} {i}".encode("cp1252") for i in range(30)], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())
    for column, reason in (
        (strings, "has strings that are not UTF-8, the first in row 4 "),
        (texts, "text holds bytes, of which no encoding is known; store it as UTF-8 strings"),
    ):
        pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
        with pytest.raises(ValueError, match=reason):
            load_data(DataConfig(datasets=[str(tmp_path / "rows.parquet")]), CHAT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "a.parquet").write_bytes(b"PAR1 broken"), "is not a complete parquet file"),
        (lambda folder: (folder / "a.jsonl").write_bytes(b""), "'mine' has no row in .*a.jsonl: 0 rows were read"),
        (lambda folder: (folder / "a.jsonl").write_bytes(b"\n\n"), "'mine' has no row in"),
        (lambda folder: (folder / "a.json").write_text("[]"), "'mine' has no row in"),
        (lambda folder: (folder / "test.jsonl").write_text('{"text": "a"}\n'), "has no split train; it has test"),
        (lambda folder: None, "has no file to read"),
        (
            lambda folder: [write_as(folder / f"a.{kind}", [{"text": "a"}]) for kind in ("parquet", "jsonl")],
            "has parquet and other files for its split train",
        ),
        (
            lambda folder: [write_as(folder / f"{name}.parquet", [{name: name}]) for name in "ab"],
            "the parquet files of 'mine' cannot be read together",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_has_one_message(tmp_path, make, message):
    folder = tmp_path / "mine"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_data(DataConfig(datasets=[str(folder)]), CHAT)
    assert "\n" not in str(error.value)


def test_the_file_s_own_code_is_not_run_and_pickles_are_text(tmp_path):
    """A folder with a loading script is a folder of sources."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text("raise SystemExit('ran')\n" * 9)
    (tmp_path / "mine" / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert load_data(DataConfig(datasets=[str(tmp_path / "mine")], max_seq_length=64), CHAT).counts[0].train > 0


LINES = [{"text": f"text {i}"} for i in range(6)]


def test_links_are_followed_and_named_by_their_own_name(tmp_path):
    (tmp_path / "real").mkdir()
    write_as(tmp_path / "real" / "more.jsonl", [{"text": f"more {i}"} for i in range(6)])
    (tmp_path / "mine").mkdir()
    write_as(tmp_path / "mine" / "some.jsonl", LINES)
    (tmp_path / "mine" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "alias").symlink_to(tmp_path / "mine")
    data = load_data(DataConfig(datasets=[str(tmp_path / "alias") + "/"]), CHAT)
    assert data.names == ["alias"] and data.counts[0].read == 12
    (tmp_path / "mine" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"gone.jsonl' leads to nothing"):
        load_data(DataConfig(datasets=[str(tmp_path / "mine")]), CHAT)
    (tmp_path / "mine" / "gone.jsonl").unlink()
    (tmp_path / "mine" / "circle").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="circle' leads in a circle"):
        load_data(DataConfig(datasets=[str(tmp_path / "mine")]), CHAT)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """A bug once: the train.jsonl of two tasks could not be learned in one stream."""
    for name in ("A/train.jsonl", "B/train.jsonl", "A/notes.txt", "B/notes.txt", "B/own.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    names = ["A/train.jsonl", "B/train.jsonl", "A/notes.txt", "B/notes.txt", "B/own.jsonl"]
    places = locate_all(DataConfig(datasets=[str(tmp_path / name) for name in names]))
    assert [place.name for place in places] == ["A", "B", "A-notes", "B-notes", "own"]
    twice = DataConfig(datasets=[str(tmp_path / "A/train.jsonl")] * 2)
    with pytest.raises(ValueError, match="datasets holds 'A' 2 times; each needs a name of its own"):
        locate_all(twice)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00002-8b6e212f3e1ece96.parquet", "train"),
        ("mine_test.jsonl.gz", "test"),
        ("val.json", "validation"),
        ("dev-1.jsonl", "validation"),
        ("validation/part-3.parquet", "validation"),
        ("test-project/train.jsonl", "train"),
        ("python-eval.jsonl", "train"),
        ("eval.jsonl", "validation"),
        ("eval/rows-2.jsonl", "validation"),
        ("text_to_prompt.jsonl", "train"),
        ("prompt-00000-of-00001.parquet", "prompt"),
        ("latest.jsonl", "train"),
        ("testament.jsonl", "train"),
    ],
)
def test_a_split_is_told_by_the_file_s_own_name_first(name, split):
    assert reading.split_of(name) == split


def test_rows_in_files_called_like_documentation_are_read(tmp_path):
    for name in ("license_questions", "citation-pairs", "readme"):
        write_as(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(5)])
    (tmp_path / "LICENSE").write_text("a licence")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert load_data(DataConfig(datasets=[str(tmp_path)]), CHAT).counts[0].read == 15


def test_parquet_is_read_by_content_whatever_its_name_columns_and_time(tmp_path):
    path = tmp_path / "a[1]*?.parquet"
    for word in ("old", "new"):
        write_as(path, [{"text": f"{word} {i}", "raw": 3} for i in range(6)])
        os.utime(path, (1, 1))
        data = load_data(DataConfig(datasets=[str(path)], columns=["text=text"]), CHAT)
        assert all(word in text for text in [*texts(data.train), *texts(data.evaluation[data.names[0]])])
    folder = tmp_path / "shards"
    folder.mkdir()
    schema = pa.schema([("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(LINES, schema), folder / "train-0.parquet")
    pq.write_table(pa.Table.from_pylist([], schema), folder / "train-1.parquet")
    assert load_data(DataConfig(datasets=[str(folder)]), CHAT).counts[0].read == 6


def test_quotes_and_repeated_names_lose_no_row_of_a_table(tmp_path):
    (tmp_path / "mine.tsv").write_text("prompt\tresponse\n" + "".join(f'"q {i}\ta {i}\n' for i in range(20)))
    assert load_data(DataConfig(datasets=[str(tmp_path / "mine.tsv")]), CHAT).counts[0].read == 20
    (tmp_path / "twice.csv").write_text("prompt,prompt,response\na,b,c\n")
    with pytest.raises(ValueError, match="two columns have the same name"):
        load_data(DataConfig(datasets=[str(tmp_path / "twice.csv")]), CHAT)
    (tmp_path / "open.csv").write_text("text\n" + "".join(f"t {i}\n" for i in range(5)) + '"never closed\nx\n')
    data = load_data(DataConfig(datasets=[str(tmp_path / "open.csv")]), CHAT)
    assert data.counts[0].malformed == 1 and "the file is not read any further" in data.reasons["open"][0].text


def test_a_mirror_has_hub_ids_by_owner_and_no_revisions(tmp_path, mirror):
    (tmp_path / "someone" / "mbpp").mkdir(parents=True)
    write_as(tmp_path / "someone" / "mbpp" / "train.jsonl", LINES)
    data = load_data(DataConfig(datasets=["someone/mbpp"], data_dir=str(tmp_path)), CHAT)
    assert data.counts[0].read == 6 and data.origins["mbpp"].endswith("someone/mbpp")
    for name, message in (("someone/mbpp:full", "has no folder full"), ("someone/mbpp@main", "has no revisions")):
        with pytest.raises(ValueError, match=message):
            load_data(DataConfig(datasets=[name], data_dir=str(tmp_path)), CHAT)
    with pytest.raises(ValueError, match="'code_alpaca' was asked for at revision main, and the mirror"):
        load_data(DataConfig(datasets=["code_alpaca@main"], data_dir=str(mirror)), CHAT)


@pytest.mark.parametrize("name", ["~nobody_of_that_name/x.jsonl", "x" * 3000, "a\0b", "code_alpaca@"])
def test_names_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match=r"cannot be a path|unknown dataset"):
        locate(name)


def test_one_object_over_several_lines_says_what_to_give(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"data": LINES}, indent=1))
    with pytest.raises(ValueError, match="one object over several lines; give an array, or an object a line"):
        load_data(DataConfig(datasets=[str(tmp_path / "mine.json")]), CHAT)


# What every machine has


@pytest.mark.parametrize("name", MACHINE_TEXT)
def test_the_machine_s_own_text_is_bounded_relative_and_the_same_twice(name):
    first, second = (read_dataset(locate(name), DataConfig(datasets=[name])) for _ in range(2))
    assert 92 <= len(first.train) <= MAX_PASSAGES and first.key == second.key
    assert not any(place.startswith(("/", "..")) for place in first.train["place"])
    assert first.train[:] == second.train[:]
