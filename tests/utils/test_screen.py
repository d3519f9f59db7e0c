"""What commands say: where it is printed, what --quiet and NO_COLOR leave of it, and what is logged."""

import io
import logging
import os

import pytest
from rich.console import Console

from dylo_moe.utils.quiet import quiet
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table

PATH = "/" + "/".join(["a_long_folder"] * 9)


@pytest.fixture(autouse=True)
def _known_surroundings(monkeypatch):
    """Whether there are colours is decided here alone, whatever the shell says."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def say_all(screen):
    table = Table("losses", ["dataset", "loss"])
    table.add_row("python", "1.234")
    screen.say("Two rows.")
    screen.say(table)
    screen.rule("stage 1")
    screen.progress("step 1 of 2")
    screen.note("one row is empty")
    screen.answer("42")
    screen.result("checkpoint", PATH)
    with screen.status("evaluating"), screen.live("bar"):
        pass


def test_statements_go_to_stdout_and_warnings_to_stderr(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    say_all(Screen("here"))
    out, err = capsys.readouterr()
    assert err == "Note: one row is empty\n"
    assert [line for line in out.splitlines() if "Two" in line or "python" in line or "step" in line] == [
        "Two rows.",
        "python    1.234",
        "step 1 of 2",
    ]
    assert f"checkpoint   {PATH}" in out.splitlines()  # longer than a line, and whole
    assert out.splitlines()[-1] == "evaluating"
    assert "bar" not in out


def test_a_long_work_says_now_and_then_how_far_it_is(capsys, monkeypatch):
    """Where nothing can change in place; a clock that stands still says only what is being done."""
    clock = iter([0, 5, 20, 30, 40])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Screen("here").counting("evaluating", 4) as advance:
        for _ in range(4):
            advance(1)
    assert capsys.readouterr().out.splitlines() == [
        "evaluating",
        "evaluating: 2 of 4, about 20 s left",
        "evaluating: 4 of 4, about 0 s left",
    ]


def test_quiet_leaves_warnings_answers_and_the_bare_path_of_the_result(capsys):
    with quiet(True):
        screen = Screen("here")
    say_all(screen)
    assert capsys.readouterr() == (f"42\n{PATH}\n", "Note: one row is empty\n")


@pytest.mark.parametrize("forced", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_color_wins_over_what_forces_colours(capsys, monkeypatch, forced):
    monkeypatch.setenv(forced, "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    say_all(Screen("here"))
    assert "\x1b[" in "".join(capsys.readouterr())
    monkeypatch.setenv("NO_COLOR", "x")
    say_all(Screen("here"))
    assert "\x1b" not in "".join(capsys.readouterr())


def test_the_environment_is_that_of_now(capsys, monkeypatch):
    """After work in several processes datasets leaves another object as os.environ."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "31")
    screen = Screen("here")
    assert screen.has_colours and screen.console.width == 31


def test_a_terminal_wraps_sentences_between_words_and_leaves_paths_whole():
    console = Console(file=io.StringIO(), width=12, force_terminal=True, color_system=None)
    screen = Screen("here", console=console)
    screen.say("several short words")
    screen.say(f"to {PATH}")
    assert console.file.getvalue() == f"several \nshort words\nto {PATH}\n"


def test_everything_is_logged_also_where_nothing_is_printed(caplog, capsys):
    caplog.set_level(logging.INFO, "dylo_moe")
    with quiet(True):
        screen = Screen("here")
    say_all(screen)
    table = "losses\ndataset    loss\n───────────────\npython    1.234\n"
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("dylo_moe.here", level, text)
        for level, text in (
            ("INFO", "Two rows."),
            ("INFO", table.strip()),
            ("INFO", "stage 1"),
            ("INFO", "step 1 of 2"),
            ("WARNING", "Note: one row is empty"),
            ("INFO", "42"),
            ("INFO", f"checkpoint   {PATH}"),
            ("INFO", "evaluating"),
        )
    ]


def test_only_the_first_process_prints_and_logs(caplog, capsys):
    caplog.set_level(logging.INFO, "dylo_moe")
    say_all(Screen("here", is_first=False))
    assert capsys.readouterr() == ("", "")
    assert caplog.records == []


def test_a_warning_during_a_live_display_goes_where_stderr_leads(monkeypatch):
    """Above the display on its terminal, or into a file; rich alone would print both on the terminal."""
    stdout, stderr = Terminal(), Terminal()
    with rich_live_on(stdout, stderr, monkeypatch):
        Screen("here").warn("careful")
    assert "careful" in stdout.getvalue()
    assert "careful" not in stderr.getvalue()
    stdout, stderr = Terminal(), io.StringIO()
    with rich_live_on(stdout, stderr, monkeypatch):
        Screen("here").warn("careful")
    assert "careful" in stderr.getvalue()
    assert "careful" not in stdout.getvalue()


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self):
        return True


def rich_live_on(stdout, stderr, monkeypatch):
    """A live display on a terminal, where another screen than that of the display may speak too."""
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    return Screen("display").live("bar")
