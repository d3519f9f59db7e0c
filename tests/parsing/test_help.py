"""The help of every command: what its real parser would print, at once, and without what takes seconds to import."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import transformers
from reference.paths import ROOT

import dylo_moe
from dylo_moe.cli import COMMANDS, main
from dylo_moe.commands.compare.arguments import COMPARE_LINE
from dylo_moe.commands.data.arguments import look_line
from dylo_moe.commands.eval.arguments import EVAL_LINE
from dylo_moe.commands.export.arguments import EXPORT_LINE
from dylo_moe.commands.plan.arguments import PLAN_LINE
from dylo_moe.commands.stream.arguments import STREAM_LINE
from dylo_moe.commands.stream.request import StageArguments
from dylo_moe.commands.submit.arguments import SUBMIT_LINE
from dylo_moe.commands.train.arguments import TRAIN_LINE
from dylo_moe.parsing import help as quick
from dylo_moe.parsing.command_line import SHOWN_FLAGS
from dylo_moe.parsing.parser import build_parser
from dylo_moe.parsing.record_flags import record
from dylo_moe.parsing.trainer_texts import TRAINER_TEXTS
from dylo_moe.training.arguments import TrainerOptions
from dylo_moe.training.trainer_arguments import TrainArguments

LINES = {
    **{line.prog: (line, TrainArguments) for line in (TRAIN_LINE, PLAN_LINE, COMPARE_LINE, SUBMIT_LINE)},
    STREAM_LINE.prog: (STREAM_LINE, StageArguments),
    **{line.prog: (line, None) for line in (EVAL_LINE, EXPORT_LINE)},
    **{prog: (look_line(prog), None) for prog in ("dylora data show", "dylora data check")},
}
SUBCOMMANDS = [["data", name] for name in ("list", "show", "check")]
SUBCOMMANDS += [["experts", name] for name in ("list", "remove", "merge", "refit")]
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "huggingface_hub", "matplotlib", "rich")
IS_RECORDED = json.loads(quick.RECORD.read_text())["transformers"] == transformers.__version__
NEEDS_RECORDED = pytest.mark.skipif(not IS_RECORDED, reason="the record is of another version of Transformers")


def run(code, *words):
    """A fresh Python; returns what it printed to stdout, where stderr must be empty."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@NEEDS_RECORDED
def test_the_record_of_the_trainers_flags_is_that_of_the_installed_version():
    """If not: python -m dylo_moe.parsing.record_flags"""
    assert json.loads(quick.RECORD.read_text()) == json.loads(json.dumps(record()))


@NEEDS_RECORDED
@pytest.mark.parametrize("columns", ["80", "131"])
@pytest.mark.parametrize("prog", LINES)
def test_the_help_is_the_real_parsers(monkeypatch, capsys, prog, columns):
    monkeypatch.setenv("COLUMNS", columns)
    line, trainer = LINES[prog]
    assert quick.print_help(line)
    assert capsys.readouterr().out == build_parser(line, trainer).format_help()


@NEEDS_RECORDED
@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), *SUBCOMMANDS], ids=" ".join)
def test_every_help_has_one_style(monkeypatch, capsys, words):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(" ".join(["usage: dylora", *words]))
    assert "takes --quiet" in " ".join(shown.split())
    if words not in ([], ["data"], ["experts"]):
        start = lines.index("examples:")
        examples = "\n".join(lines[start + 1 :]).replace("\\\n", "").splitlines()
        known = {*re.findall(r"--\w+", "\n".join(lines[:start])), "--config"}
        assert examples
        for example in examples:
            assert example.startswith(" ".join(["  dylora", *words]))
            assert set(re.findall(r"--\w+", example)) <= known
    assert re.findall("[Dd]eprecated|default: (?:None|False|\\[)|positional|show this help", shown) == []


def test_every_flag_of_the_trainer_that_a_help_shows_has_a_text():
    own = {item.name for item in dataclasses.fields(TrainerOptions)}
    assert set(SHOWN_FLAGS) - own == set(TRAINER_TEXTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "shw"], "dylora data: there is no command 'data shw'; did you mean show?"),
        (
            ["experts", "burn"],
            "dylora experts: there is no command 'experts burn'; there are list, remove, merge, refit",
        ),
        (
            ["report", "--output", "x"],
            "dylora report: FOLDER must be given (usage: dylora report FOLDER [--output FILE])",
        ),
        (
            ["experts", "refit", "x", "--sed", "1"],
            "dylora experts: there is no flag --sed; did you mean --seed? (usage: dylora experts refit CHECKPOINT "
            "[--output FOLDER] [--seed VALUE])",
        ),
        (
            ["generate", "--prompt", "x"],
            "dylora generate: --checkpoint must be given (usage: dylora generate --checkpoint FOLDER --prompt TEXT "
            "[--FLAG VALUE ...])",
        ),
        (
            ["generate", "RUN", "two words", "--max_new_tokens", "1e3", "--temperature", "hot"],
            "dylora generate: 'RUN', 'two words' belong to no flag: type --checkpoint RUN --prompt 'two words'; "
            "max_new_tokens is '1e3'; it must be a whole number; temperature is 'hot'; it must be a number (usage: "
            "dylora generate --checkpoint FOLDER --prompt TEXT [--FLAG VALUE ...])",
        ),
        (
            ["generate", "--model", "RUN"],
            "dylora generate: there is no flag --model; here it is called --checkpoint; --checkpoint and --prompt must "
            "be given (usage: dylora generate --checkpoint FOLDER --prompt TEXT [--FLAG VALUE ...])",
        ),
        (["data", "list", "x"], "dylora data: 'x' belongs to no flag (usage: dylora data list)"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(capsys, words, message):
    assert main(words) == 2
    assert capsys.readouterr() == ("", f"{message}\n")


def test_the_version_is_told_by_every_command(capsys):
    assert [main(words) for words in (["--version"], ["train", "--version"])] == [0, 0]
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == f"dylora {dylo_moe.__version__}"


def test_another_version_of_transformers_gets_no_recorded_help(monkeypatch, capsys):
    monkeypatch.setattr(quick, "version", lambda name: "0.0.1")
    assert not quick.print_help(TRAIN_LINE)
    assert capsys.readouterr().out == ""
    assert quick.print_help(EVAL_LINE)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["tarin"],
        *([name, "--help"] for name in COMMANDS),
        ["data", "show", "--help"],
        ["data", "check", "--help"],
        ["experts", "refit", "--help"],
    ],
    ids=" ".join,
)
def test_help_and_mistakes_import_nothing_heavy_and_print_no_line_of_others(words):
    if words[-1] == "--help" and len(words) == 2 and not IS_RECORDED:
        pytest.skip("the record is of another version of Transformers")
    code = (
        "import sys\nfrom dylo_moe.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as left:\n    status = left.code\n"
        f"print('LOADED', status, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = run(code, *words)
    is_mistake = words == ["tarin"]
    assert done.stdout.splitlines()[-1] == f"LOADED {2 if is_mistake else 0} []"
    assert done.stderr == ("dylora: there is no command 'tarin'; did you mean train?\n" if is_mistake else "")
    assert len(done.stdout.splitlines()) > 1 or is_mistake


def test_the_package_imports_nothing_heavy():
    done = run(f"import sys, dylo_moe\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")
