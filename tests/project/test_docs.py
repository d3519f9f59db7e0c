"""The README and docs/: links resolve, commands parse, and the generated pages show what the parsers have."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from reference.paths import ROOT

import dylo_moe
from dylo_moe.cli import COMMANDS
from dylo_moe.commands.compare.request import parse_compare
from dylo_moe.commands.data.request import parse_look
from dylo_moe.commands.eval.request import parse_eval
from dylo_moe.commands.export.request import parse_export
from dylo_moe.commands.plan.request import parse_plan
from dylo_moe.commands.stream.arguments import StreamArguments
from dylo_moe.commands.stream.request import parse_stream
from dylo_moe.commands.submit.request import parse_submit
from dylo_moe.commands.train.arguments import TRAIN_CONFIGS
from dylo_moe.commands.train.request import build_train_parser, parse_train
from dylo_moe.continual.config import GrowthConfig
from dylo_moe.parsing.flags import flags_of, values_of

OTHER_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in OTHER_PAGES if (ROOT / name).is_file()), *sorted((ROOT / "docs").glob("*.md"))]
MARKDOWN = MarkdownIt("commonmark").enable("table")


def _generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generated", ROOT / "docs" / "generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generated = _generated()


@pytest.fixture(scope="module")
def site_pages() -> dict[str, str]:
    return generated.generated_pages()


def tokens(text: str) -> Iterator[Token]:
    """All tokens of a page, those inside paragraphs and cells too."""
    for token in MARKDOWN.parse(text):
        yield token
        yield from token.children or []


# Links.


def links(text: str) -> list[str]:
    targets = [
        token.attrGet("href") or token.attrGet("src")
        for token in tokens(text)
        if token.type.startswith(("link", "image"))
    ]
    return [str(target) for target in targets if target]


def headings(text: str) -> list[str]:
    """The text of each heading, without its marks."""
    found, parsed = [], MARKDOWN.parse(text)
    for before, token in itertools.pairwise(parsed):
        if before.type == "heading_open":
            found.append("".join(child.content for child in token.children or []))
    return found


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and the site both give to the headings of a page."""
    github = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(text)}
    site = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings(text)}
    return github & site


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page, site_pages):
    for target in links(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target) or target.startswith("../../actions/"):  # the latter: GitHub's own pages
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        made = path.parent == ROOT / "docs" and path.name in site_pages and not path.is_file()
        assert made or path.exists(), f"{target} leads nowhere"
        if anchor:
            text = site_pages[path.name] if made else path.read_text(encoding="utf-8")
            assert anchor in anchors(text), f"{target}: there is no such heading"


def test_the_reader_of_links_sees_them():
    """Else the law above would hold for any page."""
    text = "# One: *two* `x`\n\n[`a`](b.md#c) and ![p](q.svg)\n\n| [k](l.md) |\n|---|\n\n    [no](code.md)\n"
    assert links(text) == ["b.md#c", "q.svg", "l.md"] and anchors(text) == {"one-two-x"}


MENTION = re.compile(r"(?<![\w./-])((?:docs|dylo_moe|recipes|tests|benchmarks)/[\w./-]+\.(?:md|py|yaml|svg|png))")
HAS_MENTIONS = (".md", ".py", ".yaml", ".yml", ".sh", ".toml", "")


def test_every_file_that_is_mentioned_exists():
    """In pages, messages, comments and recipes alike."""
    folders = ("docs", "dylo_moe", "benchmarks", "recipes", "tests", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in [*files, *(path for path in ROOT.iterdir() if path.is_file())]:
        if path.suffix not in HAS_MENTIONS or path == Path(__file__):
            continue
        for found in MENTION.findall(path.read_text(encoding="utf-8", errors="replace")):
            stands_for_many = re.search(r"[A-Z]{3}", found.replace("README", ""))
            assert stands_for_many or (ROOT / found).is_file(), f"{path.relative_to(ROOT)} mentions {found}"


# The links of the site.


def test_links_are_those_of_the_site():
    text = "[a](docs/a.md#b) [`c`](LICENSE) [d](tests/x.py) ![e](docs/e.svg) `[f](docs/f.md)` [g](https://g)\n"
    assert generated.for_the_site(text, "README.md") == (
        "[a](a.md#b) [`c`](LICENSE) d ![e](e.svg) `[f](docs/f.md)` [g](https://g)\n"
    )
    assert generated.for_the_site("[a](b.md) [c](../README.md#d)", "docs/x.md") == "[a](b.md) [c](index.md#d)"
    assert generated.for_the_site("[![t](../../x.svg)](../../y)!", "README.md") == "!"


def test_the_site_has_every_page(site_pages):
    """A page that the navigation does not name could not be found."""
    shown = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    made = {name for name in site_pages if name.endswith(".md")}
    assert sorted(shown) == sorted({path.name for path in (ROOT / "docs").glob("*.md")} | made)


def test_the_api_page_has_every_public_name():
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    shown = {name.rpartition(".")[2]: name.rpartition(".")[0] for name in names}
    public = {name: getattr(dylo_moe, name).__module__ for name in dylo_moe.__all__ if name != "__version__"}
    assert public.items() <= shown.items()


# The flags.


def rows(page: str, command: str) -> dict[str, str]:
    """The default of each flag in the section of a command."""
    section = page.split(f"\n## dylora {command}\n")[1].split("\n## ")[0]
    found = {}
    for names, default in re.findall(r"^\| (`--.*?`) \| (.*?) \| .* \|$", section, re.MULTILINE):
        found |= {name: default.strip("`") for name in re.findall(r"--(\w+)", names)}
    return found


def in_words(default) -> str:
    """How the page writes a default."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in (None, []) else str(default)


def test_the_flags_page_has_every_flag_of_ours_with_its_default(site_pages):
    """Ours, all of them; a default that is one value is compared."""
    shown = rows(site_pages["flags.md"], "train")
    ours = {flag: field for kind in TRAIN_CONFIGS for flag, field in flags_of(kind).items()}
    assert ours.keys() <= shown.keys()
    known = {option.lstrip("-") for action in build_train_parser()._actions for option in action.option_strings}
    assert shown.keys() <= known
    for name, field in ours.items():
        if field.default is not dataclasses.MISSING:
            assert shown[name] == in_words(field.default), name


def test_the_flags_page_has_every_flag_of_a_stream_with_its_default(site_pages):
    shown = rows(site_pages["flags.md"], "stream")
    for name, value in (values_of(StreamArguments()) | values_of(GrowthConfig())).items():
        assert shown[name] == in_words(value), name


def test_the_flags_page_has_every_command(site_pages):
    shown = re.findall(r"^## dylora (\w+)", site_pages["flags.md"], re.MULTILINE)
    assert list(dict.fromkeys(shown)) == list(COMMANDS)
    assert "--output" in site_pages["flags.md"].split("## dylora experts remove")[1].split("## ")[0]


# The commands.

PLACEHOLDERS = {
    "PROJECT": "my-project",
    "gs://BUCKET": "gs://my-bucket",
    "IMAGE:TAG": "image:1",
    "RECIPE": "recipes/quickstart.yaml",
}
"""What stands in a command for the reader's own, and would be refused as it is."""

NEED_A_RUN = ("--resume_from_checkpoint", "--wandb_checkpoint_artifact")
"""Flags that are looked up while a command line is read. They are checked by name and left out."""

TRAIN_HERE = ("train", "stream", "compare")
"""Commands that refuse --bf16 where there is no GPU, unless they are to run on the CPU."""

PARSERS: dict[str, Callable[..., Any]] = {
    "train": parse_train,
    "stream": parse_stream,
    "plan": parse_plan,
    "eval": parse_eval,
    "compare": parse_compare,
    "export": parse_export,
    "submit": parse_submit,
}


def commands(text: str) -> Iterator[list[str]]:
    """The words behind `dylora` of every command line in a page's blocks of code, however it is started."""
    for token in tokens(text):
        if token.type not in ("fence", "code_block") or token.info not in ("", "sh", "bash"):
            continue
        for line in token.content.replace("\\\n", " ").splitlines():
            start = re.match(r"\s*(?:\w+=\S+ )*(dylora|python|torchrun|accelerate|docker)(?= )(?! \w+:)", line)
            if start:
                yield from command(shlex.split(line, comments=True), start[1])


def command(words: list[str], program: str) -> Iterator[list[str]]:
    """The words behind `dylora` of one line, if it is a command of ours."""
    if "train.py" in words:
        yield ["train", *words[words.index("train.py") + 1 :]]
    elif "dylo_moe.cli" in words:
        yield words[words.index("dylo_moe.cli") + 1 :]
    elif "submit_full_training.py" in words:
        yield ["submit", *words[words.index("submit_full_training.py") + 1 :]]
    elif program == "dylora":
        yield words[words.index("dylora") + 1 :]
    elif program == "docker":
        behind = next((place for place, word in enumerate(words) if word in ("dylora-moe", "dylora", "judge")), None)
        if words[1:2] != ["build"] and behind is not None and words[behind + 1 :]:
            yield words[behind + 1 :]


def prepared(words: list[str], parser: Any) -> list[str]:
    """A command line that can be read without the reader's own runs and names."""
    kept: list[str] = []
    skips = False
    for before, word in zip(["", *words], words, strict=False):
        name = word.split("=")[0]
        if skips:
            skips = False
        elif name in NEED_A_RUN:
            assert name in parser._option_string_actions, word
            skips = name == word
        elif word != "..." or before.startswith("--"):
            kept.append(PLACEHOLDERS.get(word, word))
    return kept


def read(words: list[str]) -> None:
    """Parse one command line with the parsers of the command itself."""
    name, rest = words[0], words[1:]
    if "--help" in words:
        assert name == "--help" or generated.parser_of(*[word for word in words if word != "--help"])
        return
    if name in PARSERS:
        without_gpu = ["--use_cpu", "true"] if name in TRAIN_HERE and not torch.cuda.is_available() else []
        PARSERS[name]([*prepared(rest, generated.parser_of(name)), *without_gpu])
        return
    own = 1 if name in ("data", "experts") else 0
    parser = generated.parser_of(name, *rest[:own])
    if words[:2] in (["data", "show"], ["data", "check"]):
        parse_look(prepared(rest[1:], parser), prog=f"dylora data {rest[0]}")
    else:
        parser.parse_args(prepared(rest[own:], parser))


LINES = [(page, words) for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("page", "words"), LINES, ids=[f"{page.name}: {shlex.join(words)[:80]}" for page, words in LINES]
)
def test_every_command_is_read_by_its_parser(page: Path, words: list[str], monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    read(words)


def test_the_reader_of_commands_sees_them():
    """Else the law above would hold for any page."""
    text = (
        "```\ndylora eval runs/x --tasks losses   # why\ndylora train: an error\n```\n\n"
        "    torchrun --nproc_per_node 2 train.py --bf16\n    docker run --rm dylora-moe report runs/x\n"
        "    A=1 docker compose run --rm dylora train \\\n        --seed 1\n\n```yaml\ndylora: no\n```\n"
    )
    assert list(commands(text)) == [
        ["eval", "runs/x", "--tasks", "losses"],
        ["train", "--bf16"],
        ["report", "runs/x"],
        ["train", "--seed", "1"],
    ]
    for wrong in (["train", "--nothing", "1"], ["generate", "--prompt"], ["stream", "--false_alarm_rate", "7"]):
        with pytest.raises((ValueError, SystemExit)):
            read(wrong)


# The front page.


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_tree_of_the_readme_is_that_of_the_package():
    tree = (ROOT / "README.md").read_text().split("dylo_moe/   ")[1].split("```")[0]
    folders = [path.parent.name for path in (ROOT / "dylo_moe").glob("*/__init__.py")]
    assert sorted(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)) == sorted(folders)
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/ ", tree, re.MULTILINE))


def test_the_badges_are_true():
    text, project = (ROOT / "README.md").read_text(), (ROOT / "pyproject.toml").read_text()
    assert "licence: Apache-2.0" in text and 'license = "Apache-2.0"' in project
    assert "python: 3.10 or newer" in text and 'requires-python = ">=3.10"' in project
    assert ("[![tests]" in text) == (ROOT / ".github" / "workflows" / "ci.yml").is_file()
