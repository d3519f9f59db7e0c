"""What came from others is shown, and cannot steer what shows it: on a terminal, in a file, in a log, in a picture."""

import io
import logging
import re
import unicodedata
from xml.etree import ElementTree

import pytest
from rich.text import Text

from dylo_moe.cli import main
from dylo_moe.utils.harmless import harmless, harmless_logger
from dylo_moe.utils.harmless_console import HarmlessConsole, harmless_text
from dylo_moe.utils.markdown import code, plain
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table

EMBEDDINGS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""The classes of the characters that change the direction of writing."""

MARKS = "\u061c\u200e\u200f"

NASTY = "a\x1b[31m\x1b]8;;http://x\x07b\x9b1mc\u202ed\rg[link=http://x]h[/link][red]\ud800\x00"


def is_unsafe(letter):
    kind = unicodedata.category(letter)
    is_control = kind == "Cc" and letter not in "\n\t"
    return is_control or kind == "Cs" or letter in MARKS or unicodedata.bidirectional(letter) in EMBEDDINGS


def check_is_safe(text):
    """Nothing but rich's own colours, and no word of the text read as a style."""
    left = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert [hex(ord(letter)) for letter in left if is_unsafe(letter)] == []


def test_every_unsafe_character_is_written_out_and_all_others_stay():
    letters = [chr(number) for number in range(0x10000)]  # what comes behind is letters and signs
    unsafe = {letter for letter in letters if is_unsafe(letter)}
    changed = {letter for letter in letters if harmless(letter) != letter}
    assert changed - unsafe == {"\u2028", "\u2029", "\ufffe", "\uffff"}
    assert unsafe <= changed
    assert harmless("a\x1bb\r\nc\td\x9b\u202e") == "a\\x1bb\nc\td\\x9b\\u202e"


def test_a_text_keeps_its_styles():
    text = Text("a\x1bb", "bold")
    text.append("\u202ec", "red")
    shown = harmless_text(text)
    assert shown.plain == "a\\x1bb\\u202ec"
    reds = [shown.plain[span.start : span.end] for span in shown.spans if span.style == "red"]
    assert "".join(reds) == "\\u202ec"


def say_all(screen):
    table = Table(NASTY, [NASTY, "loss", Text(NASTY, "red")], words=[NASTY])
    table.add_row(NASTY, (NASTY, "1"), Text(NASTY, "bold"))
    screen.say(NASTY)
    screen.say(Text(NASTY, "green"))
    screen.say(table)
    screen.answer(NASTY)
    screen.progress(NASTY)
    screen.copyable(NASTY)
    screen.result("checkpoint", NASTY)
    screen.rule(NASTY)
    with screen.counting(NASTY, 2) as advance, screen.live(table):
        advance(2)


@pytest.mark.parametrize("system", ["truecolor", None])
def test_whatever_a_screen_says_is_harmless_and_its_markup_is_text(system, caplog):
    caplog.set_level(logging.INFO, "dylo_moe")
    console = HarmlessConsole(file=io.StringIO(), width=200, force_terminal=system is not None, color_system=system)
    screen = Screen("here", console=console)
    say_all(screen)
    screen.note(NASTY)
    printed = console.file.getvalue()
    check_is_safe(printed)
    assert printed.count("[link=http://x]h[/link][red]") >= 11
    said = [record.getMessage() for record in caplog.records]
    assert len(said) >= 9
    check_is_safe("\n".join(said))
    assert "\x1b" not in "".join(said)


def test_what_reaches_the_console_past_the_screen_is_harmless_too():
    """The console is the last place: a text of rich's own columns, a table of rich, a string with markup."""
    console = HarmlessConsole(file=io.StringIO(), width=200)
    console.print(NASTY)
    console.print(Text(NASTY))
    assert console.file.getvalue().count("[link=http://x]h[/link][red]") == 2
    check_is_safe(console.file.getvalue())


def test_a_picture_is_valid_xml():
    picture = HarmlessConsole(record=True, width=100, file=io.StringIO(), force_terminal=True)
    say_all(Screen("here", console=picture, is_answer=True, is_logged=False))
    ElementTree.fromstring(picture.export_svg(title="dylora").encode())


def test_a_log_line_and_a_cell_of_markdown_are_harmless(caplog):
    caplog.set_level(logging.INFO)
    harmless_logger("dylo_moe.there").info("saved %s", NASTY)
    assert caplog.records[-1].getMessage().startswith("saved a\\x1b[31m")
    for text in (caplog.records[-1].getMessage(), plain(NASTY), code(NASTY)):
        assert not any(map(is_unsafe, text))


@pytest.mark.parametrize("words", [[NASTY], ["generate", "--checkpoint", NASTY, "--prompt", "w1"], ["eval", NASTY]])
def test_an_error_is_one_harmless_line(words, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not any(map(is_unsafe, line))
    assert "\\x1b" in line
