"""Skills to learn in turn: kinds of text that lie on this machine, as rows of 256 tokens.

    python benchmarks/continual/skills.py [--rows 128 --held_out 32]

shows how many documents and rows of each kind this machine has. Nothing is copied, and what a program wrote is left
out. Training rows and held-out rows come from different documents; which ones follows from their names alone, and
asking for more rows gives the earlier ones first.

  python, cpp, javascript, perl, tcl     five languages, unlike each other
  english, cmake, vim                    other kinds
  write, explain                         alike in words, different in meaning: a function asked for by its docstring,
                                         and a docstring asked for by its function
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.data.encoding import IGNORED, encode_batch, text_format
from dylo_moe.data.sources.examples import Example, RowError, ask
from dylo_moe.data.sources.machine_text import READERS, Passage

NUM_TOKENS = 256
"""Length of a row."""

ROWS_AT_A_TIME = 4
"""A document gives this many rows before the next one is asked, so that a long one does not dominate."""

HELD_OUT_SHARE = 4
"""One document of this many is held out."""

LANGUAGES = ("python", "cpp", "javascript", "perl", "tcl")
OTHERS = ("english", "cmake", "vim")
PAIR = ("write", "explain")

_GENERATED = re.compile(r"\bgenerated\b|do not edit|built by|minified", re.IGNORECASE)
_ENCODED = re.compile(r"(^\s*[A-Za-z0-9+/]{60,}\n){3}", re.MULTILINE)  # pictures and the like
_HEAD_LINES = 10  # where generators put their marker
_LONG_LINE = 400  # characters; hand-written sources have no such lines


class Rows(NamedTuple):
    """Texts of one skill. All tensors int64 [rows, 256]."""

    input_ids: Tensor
    labels: Tensor
    """-100 on padding and on what is asked."""
    attention_mask: Tensor
    """0 on padding."""

    def take(self, index: Tensor | slice) -> Rows:
        """Some of the rows."""
        return Rows(*(tensor[index] for tensor in self))


class Skill(NamedTuple):
    """One skill's texts; the held-out ones are from other documents."""

    name: str
    train: Rows
    held_out: Rows


class Document(NamedTuple):
    """A file or a topic: its text, or the exchanges that were made from it."""

    name: str
    content: str | list[Example]


def read_skill(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_train: int,
    num_held_out: int,
    transform: Callable[[str], str] = str,
) -> Skill:
    """A skill's first `num_train` training rows and `num_held_out` held-out rows.

    Args:
        transform: rewrites a document's text before it is cut into rows; only of skills that are plain text.

    Raises:
        ValueError: naming what this machine lacks.
    """
    if name not in READ:
        raise ValueError(f"there is no skill {name!r}; there are {', '.join(READ)}")
    documents = sorted(documents_of(name), key=lambda document: _number(document.name))
    groups: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        groups[_number(document.name) % HELD_OUT_SHARE == 0].append(document)
    seen: set[str] = set()
    rows = [
        _first(_rows(group, tokenizer, seen, transform), count, name)
        for group, count in zip(groups[::-1], (num_held_out, num_train), strict=True)
    ]  # the held-out rows first: what they hold is not trained, under whatever name it lies there again
    return Skill(name, train=rows[1], held_out=rows[0])


@functools.cache
def documents_of(name: str) -> list[Document]:
    """All documents of a skill, read once."""
    return READ[name]()


def _plain(document: Document) -> str:
    if not isinstance(document.content, str):
        raise ValueError(f"{document.name} is exchanges and no plain text, which alone can be transformed")
    return document.content


def _first(found: Iterator[Rows], count: int, name: str) -> Rows:
    rows = [row for row, _ in zip(found, range(count), strict=False)]
    if len(rows) < count:
        raise ValueError(f"the skill {name!r} has only {len(rows)} of {count} rows here; {WHERE.get(name, '')}".strip())
    return Rows(*(torch.stack(tensors) for tensors in zip(*rows, strict=True)))


def _rows(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, seen: set[str], transform: Callable[[str], str]
) -> Iterator[Rows]:
    """Rows in turn from the documents; each has its own order, which follows from its name."""
    waiting = []
    for document in documents:
        if transform is not str:
            document = document._replace(content=transform(_plain(document)))
        rows = _cut(document, tokenizer, seen)
        yield from rows[:ROWS_AT_A_TIME]
        waiting.append(rows[ROWS_AT_A_TIME:])
    while waiting := [rows for rows in waiting if rows]:
        for rows in waiting:
            yield from rows[:ROWS_AT_A_TIME]
        waiting = [rows[ROWS_AT_A_TIME:] for rows in waiting]


def _cut(document: Document, tokenizer: PreTrainedTokenizerBase, seen: set[str]) -> list[Rows]:
    content = document.content
    digest = hashlib.sha256(repr(content).encode()).hexdigest()
    if digest in seen:  # packages carry copies of each other
        return []
    seen.add(digest)
    if isinstance(content, str):
        ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        pieces = ids[: len(ids) // NUM_TOKENS * NUM_TOKENS].view(-1, NUM_TOKENS)
        rows = [Rows(piece, piece, torch.ones_like(piece)) for piece in pieces]
    else:
        found = encode_batch(text_format(tokenizer), content, max_seq_length=NUM_TOKENS)
        rows = [_padded(row.input_ids, row.labels) for row in found if not isinstance(row, RowError)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_number(document.name)))
    return [rows[index] for index in order]


def _padded(ids: list[int], labels: list[int]) -> Rows:
    missing = NUM_TOKENS - len(ids)
    given = torch.tensor([ids + [0] * missing, labels + [IGNORED] * missing, [1] * len(ids) + [0] * missing])
    return Rows(*given)


def _number(name: str) -> int:
    """A number that looks random and is the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


# Where the texts lie


def _sources(root: Path, patterns: tuple[str, ...], left_out: str) -> Iterator[Document]:
    """Hand-written files under `root`; those whose path below it matches `left_out` are not looked at."""
    found = {path.relative_to(root).as_posix(): path for pattern in patterns for path in root.rglob(pattern)}
    for name, path in sorted(found.items()):
        if re.search(left_out, "/" + name) or path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = text.split("\n")
        is_generated = _GENERATED.search("\n".join(lines[:_HEAD_LINES])) or _ENCODED.search(text)
        if not is_generated and max(map(len, lines)) < _LONG_LINE:
            yield Document(name, text)


def _system(pattern: str) -> Iterator[Path]:
    """Folders of system text: beside this Python, and where distributions put it."""
    for root in dict.fromkeys((Path(sys.base_prefix), Path("/usr"), Path("/usr/local"), Path("/opt/homebrew"))):
        yield from sorted(path for path in root.glob(pattern) if path.is_dir() and not path.is_symlink())


def _from_system(*folders: str, patterns: tuple[str, ...], left_out: str = r"^$") -> Callable[[], list[Document]]:
    def read() -> list[Document]:
        roots = [root for folder in folders for root in _system(folder)]
        return [document for root in roots for document in _sources(root, patterns, left_out)]

    return read


def read_python() -> list[Document]:
    """The standard library, without its tests and what was generated for it."""
    left_out = (
        r"/(tests?|idlelib|lib2to3|turtledemo|site-packages|dist-packages|_bundled|encodings|pydoc_data)/|/_sysconf"
    )
    return list(_sources(Path(sysconfig.get_path("stdlib")), ("*.py",), left_out))


def _passages(kind: str) -> dict[str, list[Passage]]:
    documents: dict[str, list[Passage]] = {}
    for passage in READERS[kind]():
        documents.setdefault(passage.document, []).append(passage)
    return documents


def _from_passages(kind: str) -> Callable[[], list[Document]]:
    """One of the package's own kinds, each document whole again."""

    def read() -> list[Document]:
        found = _passages(kind)
        return [
            Document(name, "\n\n".join(passage.response for passage in passages)) for name, passages in found.items()
        ]

    return read


def _from_functions(example_of: Callable[[Passage], Example]) -> Callable[[], list[Document]]:
    """Functions of the standard library as exchanges."""

    def read() -> list[Document]:
        found = _passages("python_functions")
        return [Document(name, [example_of(passage) for passage in passages]) for name, passages in found.items()]

    return read


def write(passage: Passage) -> Example:
    """A function, asked for by its name and docstring."""
    assert passage.prompt is not None
    return ask(passage.prompt, passage.response)


def explain(passage: Passage) -> Example:
    """The same function the other way round: asked for by its source, answered by its docstring."""
    assert passage.prompt is not None
    request, docstring = passage.prompt.split("\n\n", 1)
    return ask(f"Explain the Python function {request.split()[-1]}\n\n{passage.response}", docstring)


READ: dict[str, Callable[[], list[Document]]] = {
    "python": read_python,
    "cpp": _from_passages("cpp_headers"),
    "javascript": _from_system(
        "lib/node_modules",
        "share/nodejs",
        patterns=("*.js",),
        left_out=r"/(dist|libesm|libcjs|build|min)/|\.min\.|/corepack/",
    ),
    "perl": _from_system(
        "share/perl/*", patterns=("*.pm", "*.pl"), left_out=r"unicore|Unicode/Collate|CoreList|perllocal"
    ),
    "tcl": _from_system("share/tcltk", patterns=("*.tcl",), left_out=r"pkgIndex|tclIndex|tzdata"),
    "english": _from_passages("english_reference"),
    "cmake": _from_system("share/cmake-*/Modules", patterns=("*.cmake",)),
    "vim": _from_system("share/vim/vim*", patterns=("*.vim",), left_out=r"/(lang|keymap|print)/"),
    "write": _from_functions(write),
    "explain": _from_functions(explain),
}

WHERE = {
    "cpp": "they are the headers of an installed torch",
    "javascript": "install Node.js with npm (Debian: apt-get install npm)",
    "perl": "install Perl's modules (Debian: apt-get install perl)",
    "tcl": "install Tcl and Tk (Debian: apt-get install tk)",
    "cmake": "install CMake's modules (Debian: apt-get install cmake-data)",
    "vim": "install Vim's runtime files (Debian: apt-get install vim-runtime)",
}
"""What brings a skill's text to a machine that lacks it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="whose tokens are counted")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--held_out", type=int, default=32)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    print("| skill | documents | tokens trained | tokens held out | first held-out line |\n|---|---|---|---|---|")
    for name in READ:
        try:
            skill = read_skill(name, tokenizer, num_train=arguments.rows, num_held_out=arguments.held_out)
        except ValueError as error:
            print(f"| {name} | {error} |")
            continue
        counts = [int((rows.labels != IGNORED).sum()) for rows in (skill.train, skill.held_out)]
        first = str(tokenizer.decode(skill.held_out.input_ids[0][:40])).strip().split("\n")[0][:60].replace("|", "\\|")
        print(f"| {name} | {len(documents_of(name))} | {counts[0]:,} | {counts[1]:,} | `{first}` |", flush=True)


if __name__ == "__main__":
    main()
