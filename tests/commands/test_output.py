"""What commands print as a whole: at 80 columns, with --quiet, without colours; and what they log."""

import logging
import re

import pytest
from reference.mirrors import write_mirror
from reference.trainers import train_flags

from dylo_moe.cli import main
from dylo_moe.model.model import DyLoRAMoE

NAMES = ["python_code_instructions_18k", "magicoder_oss_instruct_75k", "stack_overflow_questions", "leetcode"]
PARTS = ["python_", "instructions_", "magicoder_", "instruct_", "stack_", "overflow_", "questions", "leetcode"]
TABLES = (
    "rows read,",
    "one epoch,",
    "held-out loss,",
    "share of the",
    "tokens of a row,",
    "nats per token",
    "experts of",
)
"""How the titles of tables begin."""


@pytest.fixture(scope="module")
def words(tiny_folder, tmp_path_factory):
    """The words of a training of two steps, with a shared expert, on four datasets with long names."""
    folder = tmp_path_factory.mktemp("data")
    for place, name in enumerate(NAMES):
        rows = (tiny_folder / ("low.jsonl" if place % 2 else "high.jsonl")).read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(rows[place // 2 :: 2]))
    flags = train_flags(tiny_folder, folder / "run", "--max_steps", "2", "--shared_r", "6")
    return ["train", *flags, "--datasets", *(str(folder / f"{name}.jsonl") for name in NAMES)]


@pytest.fixture
def printed(capfd, monkeypatch):
    """Runs a command at 80 columns, where all variables ask for colours; returns its stdout and stderr, also those of
    other libraries."""
    for name, value in {"COLUMNS": "80", "FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)

    def run(*words):
        capfd.readouterr()
        assert main([str(word) for word in words]) == 0
        out, err = capfd.readouterr()
        assert "\x1b" not in out + err
        return out, err

    return run


@pytest.fixture
def run(words):
    return words[words.index("--output_dir") + 1]


def check_tables(out):
    """Lines of tables are no longer than 80 letters, and the parts of long names are whole."""
    found = re.findall(rf"^(?:{'|'.join(TABLES)}).*?\n\n(?=\S|\Z)", out, re.MULTILINE | re.DOTALL)
    assert found
    for table in found:
        assert max(map(len, table.splitlines())) <= 80
        if NAMES[3] in table:
            assert [part for part in PARTS if part not in table] == []


def test_a_training_prints_tables_that_fit_and_logs_what_it_says(words, run, printed, caplog):
    caplog.set_level(logging.INFO, "dylo_moe")
    out, err = printed(*words)
    assert err == ""
    check_tables(out)
    assert "a shared one of rank 6 with 5,568, a router of" in " ".join(out.split())
    assert f"checkpoint   {run}/checkpoint\n" in out
    logged = {record.getMessage() for record in caplog.records if record.name == "dylo_moe.train"}
    assert {line for line in out.splitlines() if line.startswith(("step ", "checkpoint ", "No expert"))} <= logged
    assert f"saved {run}/checkpoint" in {record.getMessage() for record in caplog.records}
    assert printed("report", run, "--quiet") == (f"{run}/report.html\n", "")


def test_the_answers_of_the_other_commands_fit_too(words, run, printed, tmp_path):
    checkpoint = f"{run}/checkpoint"
    for command in (
        ["eval", checkpoint],
        ["export", checkpoint, "--to", "vllm", "--output", tmp_path / "served"],
        ["experts", "list", checkpoint],
        [
            "data",
            "check",
            *words[words.index("--datasets", 5) + 1 :],
            "--model",
            words[2],
            "--data_dir",
            write_mirror(tmp_path / "mirror"),
        ],
    ):
        out, err = printed(*command)
        check_tables(out)
        assert [line for line in err.splitlines() if not line.startswith("Note: ")] == []


def test_quiet_leaves_the_answer_wherever_it_stands(words, run, printed, tmp_path):
    checkpoint = f"{run}/checkpoint"
    again = [*words, "--output_dir", str(tmp_path / "again")]
    assert printed("--quiet", *again) == (f"{tmp_path}/again/checkpoint\n", "")
    evaluate = ["eval", checkpoint, "--output_dir", tmp_path / "evaluation"]
    (loud, _), (out, err) = printed(*evaluate), printed(*evaluate, "--quiet")
    assert out in loud
    told = re.findall("^evaluating the (?:model|base) on .*", loud, re.MULTILINE)
    assert len(told) == len({*told}) == 2 * len(NAMES)
    assert "difference" in out
    assert "results" not in out
    assert err == ""
    ask = ["generate", "--checkpoint", checkpoint, "--raw", "--prompt", "w1 w2", "--max_new_tokens", "4"]
    answer = "".join(printed("--quiet", *ask)[0].split())
    assert answer
    assert answer in re.sub("⟨.*?⟩", "", printed(*ask)[0])
    plain = ["export", checkpoint, "--to", "merged", "--expert", "expert_0", "--output", tmp_path / "plain"]
    out, err = printed(*plain, "--quiet", "--no_measure")
    assert out == f"{tmp_path / 'plain'}\n"
    assert "was not measured" in err


def test_what_names_and_configs_decide_is_refused_before_weights_are_read(run, tmp_path, capsys, monkeypatch):
    """And all that is wrong with a command line is in one message."""
    monkeypatch.setattr(DyLoRAMoE, "from_pretrained", lambda *args, **options: pytest.fail("weights are read"))
    ask, new = ["generate", "--checkpoint", run, "--raw", "--prompt", "w1"], str(tmp_path / "new")
    for words, parts in (
        (
            [*ask, "--temperature", "inf", "--seed", "-1", "--max_new_tokens", "0", "--expert", "nope"],
            (
                "temperature is inf",
                "seed is -1",
                "max_new_tokens is 0",
                "expert is 'nope'; the checkpoint has expert_0",
            ),
        ),
        ([*ask, "--max_new_tokens", "999999999999"], ("--max_new_tokens is 999,999,999,999, but ",)),
        (["experts", "remove", run, "nope", "--output", run], ("expert is 'nope'", f"output {run} exists")),
        (["experts", "refit", run, "--output", new], ("has no skill library",)),
        (["experts", "merge", run, "expert_0", "expert_1", "--output", new], ("has no skill library",)),
        (["eval", run, "--eval_subset", "0", "--seed", "-1", "--expert", "nope"], ("eval_sub", "seed", "is 'nope'")),
    ):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert [part for part in parts if part not in line] == []
