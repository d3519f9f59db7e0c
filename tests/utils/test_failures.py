"""What a command says of an error: a line for a user, a traceback and where to report it for a bug."""

from __future__ import annotations

import pytest
import torch

from dylo_moe import cli
from dylo_moe.utils.failures import REPORT, explained


def raised(make) -> BaseException:
    with pytest.raises(Exception) as info:
        make()
    return info.value


@pytest.mark.parametrize("command", ["train", "stream", "compare", "eval", "export", "generate"])
def test_no_memory_has_advice_with_flags_of_the_command(command):
    error = raised(lambda: torch.empty(2**62, dtype=torch.uint8))
    for one in (error, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        message = explained(one, command)
        assert "there is not enough memory" in message and "--" in message
        assert "\n" not in message
    assert "--batch_size" not in explained(error, "train")


def test_a_missing_package_is_a_line_and_a_missing_part_of_ours_is_a_bug():
    message = "the package no_such_tracker is not installed, and this needs it"
    assert explained(raised(lambda: __import__("no_such_tracker")), "train") == message
    assert explained(raised(lambda: __import__("dylo_moe.no_such_part")), "train") is None
    assert explained(raised(lambda: exec("from json import no_such_name")), "train") is None


def test_what_is_said_is_one_line():
    assert explained(ValueError("one\n  two"), "train") == "one two"
    assert explained(ValueError(), "train") == "ValueError"
    assert "there is not enough memory" in explained(OSError(12, "Cannot allocate memory"), "train")


def test_a_bug_shows_its_traceback_and_where_to_report_it(monkeypatch, capsys):
    def broken(words):
        return {}["a mistake of ours"]

    monkeypatch.setattr("dylo_moe.commands.report.main", broken)
    assert cli.main(["report", "x"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "KeyError: 'a mistake of ours'" in shown
    assert shown.strip().endswith(f"dylora report: {REPORT}")
