"""A training whose data, file names and tokens hold control characters: nothing that is shown of it has one."""

import re
import shutil
from xml.etree import ElementTree

import pytest
from reference.trainers import train_flags

from dylo_moe.cli import main

STEERS = "\x1b]0;x\x07\x9b1m\u202e[red]"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """The tiny base with words that steer a terminal, and two datasets of such names and words."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(tiny_folder / "base", folder / "base")
    written = folder / "base" / "tokenizer.json"
    steering = STEERS.encode("unicode_escape").decode().replace("\\x", "\\u00")
    written.write_text(re.sub(r'"(w\d+)"', lambda found: f'"{found[1]}{steering}"', written.read_text()))
    for name in ("low", "high"):
        rows = re.sub(r"(w\d+)", lambda found: found[1] + steering, (tiny_folder / f"{name}.jsonl").read_text())
        (folder / f"{name}{STEERS}.jsonl").write_text(rows)
    return folder


def test_nothing_that_is_shown_of_a_run_can_steer_what_shows_it(folder, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    data = [str(folder / f"{name}{STEERS}.jsonl") for name in ("low", "high")]
    run = folder / f"run{STEERS}"
    flags = train_flags(folder, run, "--max_steps", "2", "--datasets", *data)
    checkpoint = str(run / "checkpoint")
    ask = ["generate", "--checkpoint", checkpoint, "--raw", "--prompt", f"w1{STEERS}", "--max_new_tokens", "4"]
    for words in (
        ["train", *flags],
        ["report", str(run)],
        ask,
        ["experts", "list", checkpoint],
        ["data", "show", data[0], "--model", str(folder / "base")],
    ):
        assert main(words) == 0, capfd.readouterr()
        shown = COLOURS.sub("", "".join(capfd.readouterr()))
        assert UNSAFE.findall(shown) == []
        assert "\\u202e[red]" in shown.replace("\n", "")
    picture, page = run / "result.svg", (run / "report.html").read_text()
    assert "\\u202e[red]" in "".join(ElementTree.parse(picture).getroot().itertext()).replace("\xa0", " ")
    assert "\\u202e[red]" in page
    for text in (page, picture.read_text(), (run / "checkpoint" / "README.md").read_text()):
        assert UNSAFE.findall(text) == []
