"""benchmarks/README.md has every script, its command runs one that exists, and the figures are where it says."""

import re

from reference.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
PAGE = (BENCHMARKS / "README.md").read_text()
ROW = re.compile(
    r"^\| `(?P<script>\w+\.py)` \| (?P<question>.+?) \| *(?P<command>.*?) *\| *(?P<figures>.*?) *\|$", re.MULTILINE
)


def sections():
    """(folder, the text below its heading) of the page."""
    parts = re.split(r"^## (\w+): .*$", PAGE, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def rows():
    """(path of the script in benchmarks/, the row's match)."""
    return [(f"{folder}/{row['script']}", row) for folder, text in sections() for row in ROW.finditer(text)]


def test_the_page_has_every_script_once():
    scripts = sorted(path.relative_to(BENCHMARKS).as_posix() for path in BENCHMARKS.glob("*/*.py"))
    assert sorted(script for script, _ in rows()) == scripts


def test_each_script_has_its_own_command_or_is_a_part_of_one_that_has():
    commands = {script: row["command"] for script, row in rows()}
    for script, row in rows():
        if row["question"].startswith("part of "):
            whole = re.match(r"part of `(\w+\.py)`: ", row["question"])[1]
            assert not row["command"] and commands[f"{script.split('/')[0]}/{whole}"]
        elif row["command"] == "`make image-check`":
            assert f"benchmarks/{script}" in (ROOT / "Makefile").read_text()
        else:
            assert row["command"].startswith(f"`python benchmarks/{script}")


def test_the_figures_are_on_the_page_that_is_named():
    for script, row in rows():
        if row["figures"]:
            page = re.fullmatch(r"\[(.+\.md)\]\(\.\./docs/\1\)", row["figures"])[1]
            assert script.split("/")[1] in (ROOT / "docs" / page).read_text(), f"{page} does not name {script}"
