"""The pages of the site that are not committed: the front page, the flags, the modules; and links that leave docs/.

MkDocs loads this file as a hook (mkdocs.yml). tests/project/test_docs.py reads the same pages.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent

OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "CITATION.cff": "CITATION.cff",
    "LICENSE": "LICENSE",
}
"""Files of the repository outside docs/ that the site has too, and where."""

LINK = re.compile(r"(!?)\[((?:[^\[\]`]|`[^`\n]*`|\[[^\[\]]*\])*)\]\(([^()\s]+)\)|`[^`\n]+`")
"""A Markdown link or picture: its mark, its text, its target; or inline code, which has no links."""


# The hook.


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those that MkDocs found in docs/."""
    from mkdocs.structure.files import File

    for name, text in generated_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of a committed page, which are those of the repository, into those of the site."""
    return markdown if page.file.generated_by else for_the_site(markdown, f"docs/{page.file.src_uri}")


# The pages.


def generated_pages() -> dict[str, str]:
    """Every generated file of the site: its name and its text."""
    copies = {
        there: for_the_site((ROOT / here).read_text(encoding="utf-8"), here) if here.endswith(".md") else
        (ROOT / here).read_text(encoding="utf-8")
        for here, there in OUTSIDE.items()
        if (ROOT / here).is_file()
    }  # fmt: skip
    return {**copies, "flags.md": flags_page(), "modules.md": modules_page()}


def for_the_site(markdown: str, path: str) -> str:
    """A page's links as the site needs them; of a link to a file that the site does not have, the text stays.

    Args:
        markdown: the page.
        path: where it is in the repository.
    """
    folder = posixpath.dirname(path)

    def link(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if target is None:
            return match[0]
        text = LINK.sub(link, text)
        name, sign, anchor = target.partition("#")
        if not name or re.match(r"[a-z]+:", name):
            return f"{mark}[{text}]({target})"
        place = posixpath.normpath(posixpath.join(folder, name))
        there = place.removeprefix("docs/") if place.startswith("docs/") else OUTSIDE.get(place)
        if there is None or (there in OUTSIDE.values() and not (ROOT / place).is_file()):
            return "" if mark else text
        return f"{mark}[{text}]({there}{sign}{anchor})"

    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else LINK.sub(link, part) for index, part in enumerate(parts))


def flags_page() -> str:
    """Every command with its flags, from the parsers themselves."""
    from dylo_moe.cli import COMMANDS
    from dylo_moe.parsing.command_line import REFUSED

    lines = [
        "# Flags",
        "",
        "This page is made from the parsers of the commands when the site is built. `dylora COMMAND --help` prints the "
        "same. A command that takes flags of `dylora train` also takes `--config RECIPE`, a YAML file of `flag: value` "
        "lines or the name of a shipped recipe; the command line wins over it. Every flag of "
        "`transformers.TrainingArguments` that is not listed as refused works under its own name where training "
        "happens: `--help_all` shows them all.",
        "",
    ]
    for command, summary in COMMANDS.items():
        for words in subcommands(command):
            parser = parser_of(*words)
            text = " ".join((parser.description or summary).rstrip(".").split())
            lines += [f"## dylora {' '.join(words)}", "", f"{text[0].upper()}{text[1:]}.", "", *usage(parser)]
            rows = [row(action) for action in shown(parser)]
            lines += ["| flag | default | meaning |", "|---|---|---|", *rows, ""] if rows else []
    lines += ["## Refused", "", "These flags of the Trainer would do nothing here, or something wrong.", ""]
    lines += ["| flag | reason |", "|---|---|", *(f"| `--{name}` | {cell(why)} |" for name, why in REFUSED.items())]
    return "\n".join([*lines, ""])


def subcommands(command: str) -> Iterator[tuple[str, ...]]:
    """The words of a command, or of each of its own commands where it has some."""
    import importlib

    own = getattr(importlib.import_module(f"dylo_moe.commands.{command}"), "COMMANDS", None)
    yield from [(command, name) for name in own] if own else [(command,)]


def parser_of(*words: str) -> argparse.ArgumentParser:
    """The parser whose help `dylora WORDS --help` prints."""
    from dylo_moe.cli import main

    found: list[argparse.ArgumentParser] = []
    remembered = mock.patch.object(
        argparse.ArgumentParser, "print_help", lambda parser, file=None: found.append(parser)
    )
    with remembered, contextlib.suppress(SystemExit):  # argparse leaves the program after its own --help
        main([*words, "--help"])
    return found[0]


def usage(parser: argparse.ArgumentParser) -> list[str]:
    """The parser's usage as a block of code."""
    lines = parser.usage.splitlines() if parser.usage else [" ".join(parser.format_usage().split()[1:])]
    return ["```", *(line.strip().replace("[-h] ", "").replace(" [-h]", "") for line in lines), "```", ""]


def shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments that the parser's help shows, but for --help itself and the --no_FLAG twins of switches."""
    hidden = ("help", *(f"no_{action.dest}" for action in parser._actions))
    names = [(action, (action.option_strings or [action.dest])[0].lstrip("-")) for action in parser._actions]
    return [action for action, name in names if action.help != argparse.SUPPRESS and name not in hidden and name != "h"]


def row(action: argparse.Action) -> str:
    """The row of one argument."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    meaning = argparse.HelpFormatter("x")._expand_help(action) if action.help else ""
    if action.choices:
        meaning += f" One of {', '.join(map(str, action.choices))}."
    return f"| {names} | {default(action)} | {cell(meaning)} |"


def default(action: argparse.Action) -> str:
    """An argument's default as the page shows it."""
    from dylo_moe.parsing.help_format import default_in_words

    if action.required or not action.option_strings:
        return "required"
    words = default_in_words(action.default)
    if action.const is True:  # a switch
        return "on" if words == "True" else "off"
    return f"`{words}`" if words else "none"


def cell(text: str) -> str:
    """Text in a table's cell: one line, with its bars and angle brackets taken as text."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def modules_page() -> str:
    """Every module with the first sentence of its docstring, folder by folder."""
    package = ROOT / "dylo_moe"
    lines = ["# Modules", "", "This page is made from the modules' own docstrings when the site is built.", ""]
    for folder in [package, *sorted(path for path in package.rglob("*") if (path / "__init__.py").is_file())]:
        name = folder.relative_to(ROOT).as_posix()
        lines += [f"## {name}", "", summary_of(folder / "__init__.py"), ""]
        files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
        if files:
            lines += ["| module | what it is |", "|---|---|"]
            lines += [f"| `{path.name}` | {cell(summary_of(path))} |" for path in files] + [""]
    return "\n".join(lines)


def summary_of(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line."""
    return " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
