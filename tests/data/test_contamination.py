"""Overlap with the benchmarks: found where it is, not found where it is not, on the real HumanEval."""

import json
import re

import pytest
from reference.mirrors import write_mirror
from reference.texts import CHAT, write_rows

from dylo_moe.data.config import DataConfig
from dylo_moe.data.contamination import NGRAM, SHARE, Benchmarks, BenchmarkText, load_benchmarks, ngrams
from dylo_moe.data.loading import load_data
from dylo_moe.data.sources.machine_text import READERS
from dylo_moe.data.sources.read import read_test


@pytest.fixture(scope="module")
def humaneval() -> list[dict]:
    """The real one, from its package."""
    return list(read_test("humaneval", DataConfig()))


@pytest.fixture(scope="module")
def real(humaneval) -> Benchmarks:
    benchmarks, missing = load_benchmarks(DataConfig())
    assert list(missing) == ["mbpp"] and len(benchmarks.problems) == len(humaneval) == 164
    return benchmarks


def test_every_problem_of_humaneval_is_found_whole_in_prose_and_as_a_solution(real, humaneval):
    """Laid out anew, in a row's other text, without the examples, or the solution alone."""
    too_short = 0
    for row in humaneval:
        docstring = re.findall(r'("""|\'\'\')(.*?)\1', row["prompt"], re.DOTALL)[-1][1]
        prose = re.split(r"\n\s*(?:>>>|[Ee]xamples?\b|For example)", docstring)[0]
        copies = [f"Please do this:\n{row['prompt']}\nThank you.", row["prompt"] + row["canonical_solution"]]
        copies.append(f"Write a program. {' '.join(prose.split()).upper()} It must be quick.")
        if len(list(ngrams(prose))) < 1:
            too_short += 1
            copies.pop()
        if len(list(ngrams(row["canonical_solution"]))) > 0:
            copies.append(row["canonical_solution"].replace("    ", "\t"))
        for copy in copies:
            found = real.overlap(copy)
            assert found is not None and found.share >= SHARE, (row["task_id"], copy)
    assert too_short < 10 and real.unfindable == 0


def test_real_functions_that_are_no_problem_are_not_called_one(real):
    functions = list(READERS["python_functions"]())
    assert len(functions) > 2000
    found = [real.overlap(f"{function.prompt}\n{function.response}") for function in functions]
    assert [overlap for overlap in found if overlap is not None] == []


def test_a_share_is_that_of_the_words_in_common():
    words = [f"w{i}" for i in range(23)]  # 16 sequences of 8 words
    benchmarks = Benchmarks([BenchmarkText("t/1", " ".join(words), ""), BenchmarkText("t/2", "too short", "too short")])
    assert benchmarks.unfindable == 1
    assert benchmarks.overlap(" ".join(words[:15])).share == 8 / 16
    assert benchmarks.overlap(" ".join(words[:14])) is None
    assert benchmarks.overlap(" ".join([*words[:8], "x", *words[8:]])).share == (1 + 8) / 16
    assert benchmarks.overlap(", ".join(words).upper()) == ("t/1", 1.0)
    assert benchmarks.overlap("") is None and NGRAM == 8


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return write_mirror(tmp_path_factory.mktemp("mirror"))


def contaminated_rows(mirror) -> list[dict]:
    config = DataConfig(data_dir=str(mirror))
    human, mbpp = next(read_test("humaneval", config)), next(read_test("mbpp", config))
    rows = [{"prompt": f"What is {i} and {i}?", "response": f"{2 * i}"} for i in range(20)]
    rows.append({"prompt": f"Finish: {human['prompt']}", "response": human["canonical_solution"]})
    rows.append({"prompt": mbpp["text"], "response": "I do not know."})
    return rows


def test_decontaminate_removes_the_rows_and_says_how_many_and_of_what(tmp_path, mirror):
    """The test split of a mirror's own MBPP, and HumanEval from the mirror, which goes before the package."""
    path = write_rows(tmp_path / "mine.jsonl", contaminated_rows(mirror))
    kept, removed = (
        load_data(DataConfig(datasets=[path], data_dir=str(mirror), decontaminate=wanted), CHAT)
        for wanted in (False, True)
    )
    assert (kept.counts[0].contaminated, removed.counts[0].contaminated) == (0, 2)
    assert removed.counts[0].train + removed.counts[0].evaluation == 20
    assert removed.notes == ["2 rows overlap with the 25 problems of HumanEval and MBPP's test split, and are removed."]
    texts = [reason.text for reason in removed.reasons["mine"]]
    assert sorted(texts) == ["it overlaps with HumanEval/0", "it overlaps with MBPP/11"]


def test_decontaminate_without_a_benchmark_is_refused_not_weakened(tmp_path, monkeypatch):
    monkeypatch.setattr("dylo_moe.data.sources.hub.no_way_to_hub", lambda: True)
    path = write_rows(tmp_path / "mine.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(ValueError, match=r"decontaminate cannot compare with mbpp: the dataset 'mbpp' cannot be read"):
        load_data(DataConfig(datasets=[path], decontaminate=True), CHAT)


def test_mbpp_s_train_split_is_not_taken_for_its_test_split(mirror):
    data = load_data(DataConfig(datasets=["mbpp"], data_dir=str(mirror), max_seq_length=500), CHAT)
    assert data.counts[0].train == 30
    assert json.dumps(data.reasons["mbpp"]).count("overlaps") == 0
