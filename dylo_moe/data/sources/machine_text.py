"""Several kinds of text that every machine with this library already has.

The text is read from the installed packages; nothing is copied. The kinds differ enough for a router to
distinguish them and are large enough to train on, so a first run needs neither a download nor data of one's own.
Passages come in an order that follows from file names alone.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from dylo_moe.data.sources.pieces import cut_pieces, paragraphs

MAX_PASSAGES = 480
"""The most passages taken from one kind, so that all kinds weigh about the same."""

PIECE_CHARACTERS = 400
"""The most characters of a piece of plain text: 80 tokens of English, 130 of CMake."""

FUNCTION_CHARACTERS = 480
"""The most characters of a function of `python_functions` together with its request: 140 tokens."""

MIN_PIECE_CHARACTERS = 120
"""The fewest characters of a piece. A shorter one is joined with a neighbour, a shorter document is left out."""

FUNCTION_LINES = range(3, 41)
"""The number of lines that a function of `python_functions` may have without its docstring."""

_HEAD_LINES = 10  # generators of code put their marker there

_GENERATED = re.compile(r"@generated\b|auto-?generated|automatically generated|generated (by|cmake)", re.IGNORECASE)

_LICENCE = re.compile(r"copyright|licen[sc]ed? (under|by)|permission is hereby|provided \"as is\"|OSI-approved", re.I)

_STDLIB_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "_bundled",
}

_TORCH_ONLY = "!defined(TORCH_STABLE_ONLY) && !defined(TORCH_TARGET_VERSION)"


class Passage(NamedTuple):
    """One text, and the file it came from, such as `torch/include/c10/util/Half.h`."""

    prompt: str | None
    """What is asked; None for plain text."""
    response: str
    document: str


def _files(root: Path, folder: str, suffix: str, left_out: Set[str] = frozenset()) -> list[tuple[str, Path]]:
    """Files under `root/folder` as (name relative to root, path), sorted by the name's parts.

    Folders named in `left_out` are not entered: site-packages may be inside the standard library.
    """
    found: dict[tuple[str, ...], Path] = {}
    for parent, folders, files in os.walk(root / folder):
        folders[:] = [name for name in folders if name not in left_out]
        paths = [Path(parent, name) for name in files if name.endswith(suffix)]
        found |= {path.relative_to(root).parts: path for path in paths}
    return [("/".join(parts), found[parts]) for parts in sorted(found)]


def _torch_parent() -> Path:
    """The folder that holds the installed torch package; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("torch is not installed, so its headers and CMake files cannot be read; install torch")
    return Path(next(iter(spec.submodule_search_locations))).parent


# Python functions


def read_python_functions() -> Iterator[Passage]:
    """Functions of the standard library with a docstring; the request holds the name and the docstring."""
    for name, path in _files(Path(sysconfig.get_path("stdlib")), "", ".py", _STDLIB_LEFT_OUT):
        yield from _functions(path, name)


def _functions(path: Path, document: str) -> Iterator[Passage]:
    try:
        with tokenize.open(path) as file:
            text = file.read()
        if "def " not in text or '"""' not in text:  # parsing modules of tables and constants takes long
            return
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # a few library files are invalid on purpose
        return
    lines = text.split("\n")
    for node in _definitions(tree.body):
        docstring = ast.get_docstring(node)
        source = _without_docstring(node, lines) if docstring else None
        if source is None:
            continue
        prompt = f"Write the Python function `{node.name}`.\n\n{docstring}"
        if source.count("\n") + 1 in FUNCTION_LINES and len(prompt) + len(source) <= FUNCTION_CHARACTERS:
            yield Passage(prompt, source, document)


def _definitions(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of a module and methods of its classes, not functions inside functions."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str | None:
    """The source of a function without its docstring, comments included; None if other code shares the docstring's
    lines."""
    docstring, rest = node.body[0], node.body[1:]
    if not rest or docstring.end_lineno is None or node.end_lineno is None:
        return None
    shares_first_line = lines[docstring.lineno - 1][: docstring.col_offset].strip() != ""
    if shares_first_line or rest[0].lineno <= docstring.end_lineno:
        return None
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    head = lines[start - 1 : docstring.lineno - 1]
    body = lines[docstring.end_lineno : node.end_lineno]
    while body and not body[0].strip():
        body = body[1:]
    source = textwrap.dedent("\n".join([*head, *body])).rstrip()
    return None if source[:1].isspace() else source  # a text at column 0 inside the function stops dedent


# Plain text


def read_cpp_headers() -> Iterator[Passage]:
    """Hand-written C++ headers of the installed torch, without those that a program wrote."""
    for folder in ("ATen/core", "c10", "torch/csrc"):
        for name, path in _files(_torch_parent(), f"torch/include/{folder}", ".h"):
            # TensorBody.h is filled in from a template and carries no marker
            if "generated" not in name and not name.endswith("/TensorBody.h"):
                yield from file_pieces(path, name)


def read_cmake() -> Iterator[Passage]:
    """Hand-written CMake modules that come with the installed torch."""
    for name, path in _files(_torch_parent(), "torch/share/cmake", ".cmake"):
        yield from file_pieces(path, name)


def read_english_reference() -> Iterator[Passage]:
    """The Python language reference in English, as `help()` shows it; one topic is one document.

    Some topics are chapters that contain other topics. A topic that repeats a longer one is left out, so that
    held-out topics were not read in training under another name. Tables are left out too.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        lines = [line for line in topics[topic].split("\n") if not line.lstrip().startswith(("|", "+-", "+="))]
        text = "\n".join(lines)
        paragraphs = {" ".join(part.split()) for part in text.split("\n\n") if len(part) >= MIN_PIECE_CHARACTERS}
        if seen.isdisjoint(paragraphs):
            kept[topic] = text
        seen |= paragraphs
    for topic in sorted(kept):
        yield from _pieces_of(kept[topic], f"pydoc_data/topics.py:{topic}")


def file_pieces(path: Path, document: str) -> Iterator[Passage]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if not _GENERATED.search("\n".join(text.split("\n")[:_HEAD_LINES])):
        yield from _pieces_of(_without_notices(_without_guard(text)), document)


def _without_guard(text: str) -> str:
    """Remove the lines that torch's build wraps around every header, which all documents would share."""
    lines = text.strip().split("\n")
    if _TORCH_ONLY in lines[0]:
        lines = lines[1:]
        if lines and _TORCH_ONLY in lines[-1]:  # `#else`, `#error ...`, `#endif`
            lines = lines[:-3]
    return "\n".join(lines)


def _without_notices(text: str) -> str:
    """Remove the paragraphs that are a licence notice in a comment."""
    kept = (
        part for part in paragraphs(text) if not (part.lstrip().startswith(("#", "/", "*")) and _LICENCE.search(part))
    )
    return "".join(kept).removesuffix("\n")


def _pieces_of(text: str, document: str) -> Iterator[Passage]:
    pieces = cut_pieces(text, PIECE_CHARACTERS, minimum=MIN_PIECE_CHARACTERS)
    return (Passage(None, piece, document) for piece in pieces)


READERS: dict[str, Callable[[], Iterator[Passage]]] = {
    "python_functions": read_python_functions,
    "cpp_headers": read_cpp_headers,
    "english_reference": read_english_reference,
    "cmake": read_cmake,
}


def read_machine_text(name: str) -> tuple[list[Passage], int]:
    """Read an even choice of at most MAX_PASSAGES passages of one kind, and count those that were left out.

    Raises ValueError if this machine has no such text.
    """
    found = list(READERS[name]())
    if not found:
        raise ValueError(f"the dataset {name!r} has no text on this machine; leave it out")
    chosen = choose_evenly(found, MAX_PASSAGES)
    return chosen, len(found) - len(chosen)


def choose_evenly(passages: Sequence[Passage], limit: int) -> list[Passage]:
    """Choose at most `limit` passages as evenly over the documents as their sizes allow, in the order given.

    With more documents than `limit`, evenly spaced documents give one passage each. Otherwise every document
    gives the same number, or all it has. Within a document the choice is evenly spaced as well.
    """
    documents: dict[str, list[int]] = {}
    for index, passage in enumerate(passages):
        documents.setdefault(passage.document, []).append(index)
    groups = _spaced(list(documents.values()), limit)
    chosen: list[int] = []
    room = limit
    for done, group in enumerate(sorted(groups, key=len)):  # small ones first, to give what they leave to the others
        share = min(len(group), room // (len(groups) - done))
        chosen += _spaced(group, share)
        room -= share
    return [passages[index] for index in sorted(chosen)]


def _spaced(items: list, count: int) -> list:
    """Choose `count` evenly spaced items, from the middles of equal stretches; all items if there are no more."""
    if len(items) <= count:
        return items
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]
