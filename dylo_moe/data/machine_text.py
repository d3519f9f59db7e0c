"""Where examples come from: text that every machine already has, or a local jsonl file.

The built-in sources are read where the installed packages keep them; nothing is copied. They differ enough
for a router to tell apart and are large enough to train on, so a first run needs neither a download nor
data of one's own. Examples come in an order that follows from file names alone.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import os
import re
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAX_EXAMPLES_PER_SOURCE = 480
"""Examples taken from one built-in source, so that all weigh about the same. Local files are not bounded."""

PIECE_CHARACTERS = 400
"""Upper size of one piece of plain text: 80 tokens of English, 130 of CMake."""

FUNCTION_CHARACTERS = 480
"""Upper size of one function of `python_functions` together with its request: 140 tokens."""

MIN_PIECE_CHARACTERS = 120
"""A shorter piece takes in the next part, or joins the one before it; a shorter document is no example."""

FUNCTION_LINES = range(3, 41)
"""Lines a function of `python_functions` may have, its docstring not counted."""

_HEAD_LINES = 10  # where generators put their marker
_GENERATED = re.compile(r"@generated\b|auto-?generated|automatically generated|generated (by|cmake)", re.IGNORECASE)
_LICENCE = re.compile(r"copyright|licen[sc]ed? (under|by)|permission is hereby|provided \"as is\"|OSI-approved", re.I)
_BORDER = re.compile(r"\s*(#+|//+|\*+)?\s*")  # an empty line, or an empty line of a comment
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


class Example(NamedTuple):
    """One text to learn. `prompt` None means plain text: every token of `response` is trained."""

    prompt: str | None
    response: str
    document: str
    """Relative name of the file it came from, such as `torch/include/c10/util/Half.h`."""


class Reading(NamedTuple):
    """What `read_source` found: the examples, and what it did not take."""

    name: str
    examples: list[Example]
    left_out: int
    """Good examples not taken because the source is bounded."""
    malformed: int
    first_malformed: str | None
    """`FILE:LINE: reason` of the first malformed line."""


@dataclass(frozen=True)
class Source:
    """A built-in source. `read` yields every example it has; `read_source` takes an even choice of them."""

    name: str
    description: str
    licence: str
    read: Callable[[], Iterator[Example]]


def _files(root: Path, folder: str, suffix: str, left_out: Set[str] = frozenset()) -> list[tuple[str, Path]]:
    """Files under `root/folder` as (name relative to root, path), sorted by the name's parts.

    Folders named in `left_out` are not entered: site-packages may lie inside the standard library.
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


def read_python_functions() -> Iterator[Example]:
    """Functions of the standard library with a docstring; the request holds the name and the docstring."""
    for name, path in _files(Path(sysconfig.get_path("stdlib")), "", ".py", _STDLIB_LEFT_OUT):
        yield from _functions(path, name)


def _functions(path: Path, document: str) -> Iterator[Example]:
    try:
        with tokenize.open(path) as file:
            text = file.read()
        if "def " not in text or '"""' not in text:  # saves parsing tables and constants
            return
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # a few library files are wrong on purpose
        return
    lines = text.split("\n")
    for node in _definitions(tree.body):
        docstring = ast.get_docstring(node)
        source = _without_docstring(node, lines) if docstring else None
        if source is None:
            continue
        prompt = f"Write the Python function `{node.name}`.\n\n{docstring}"
        if source.count("\n") + 1 in FUNCTION_LINES and len(prompt) + len(source) <= FUNCTION_CHARACTERS:
            yield Example(prompt, source, document)


def _definitions(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of a module and methods of its classes, not functions inside functions."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str | None:
    """The function's text, comments included, less its docstring's lines; None where other code shares them."""
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


def read_cpp_headers() -> Iterator[Example]:
    """Hand-written C++ headers of the installed torch, without those that a program wrote."""
    for folder in ("ATen/core", "c10", "torch/csrc"):
        for name, path in _files(_torch_parent(), f"torch/include/{folder}", ".h"):
            # TensorBody.h is filled in from a template and carries no marker
            if "generated" not in name and not name.endswith("/TensorBody.h"):
                yield from _file_pieces(path, name)


def read_cmake() -> Iterator[Example]:
    """Hand-written CMake modules that come with the installed torch."""
    for name, path in _files(_torch_parent(), "torch/share/cmake", ".cmake"):
        yield from _file_pieces(path, name)


def read_english_reference() -> Iterator[Example]:
    """The Python language reference in English, as `help()` shows it; one topic is one document.

    Some topics are chapters that hold others whole. A topic that repeats a longer one is left out, so that
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


def _file_pieces(path: Path, document: str) -> Iterator[Example]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if not _GENERATED.search("\n".join(text.split("\n")[:_HEAD_LINES])):
        yield from _pieces_of(_without_guard(text), document)


def _without_guard(text: str) -> str:
    """Less the lines that torch's build wraps around every header: all documents would share them."""
    lines = text.strip().split("\n")
    if _TORCH_ONLY in lines[0]:
        lines = lines[1:]
        if lines and _TORCH_ONLY in lines[-1]:  # `#else`, `#error ...`, `#endif`
            lines = lines[:-3]
    return "\n".join(lines)


def _pieces_of(text: str, document: str) -> Iterator[Example]:
    return (Example(None, piece, document) for piece in cut_pieces(text))


def cut_pieces(text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """Cut a text at paragraph borders into pieces of `size` characters or less, licence notices left out.

    A paragraph longer than `size` is cut at a line's end, a line longer than `size` inside. So that no piece
    is under MIN_PIECE_CHARACTERS, a piece may exceed `size` by that much at either end.
    """
    pieces: list[str] = []
    current = ""
    for paragraph in _paragraphs(text):
        for part in [paragraph] if len(paragraph) <= size else _lines_within(paragraph, size):
            if len(current) + len(part) > size and len(current.strip()) >= MIN_PIECE_CHARACTERS:
                pieces.append(current)
                current = ""
            current += part
    if pieces and len(current.strip()) < MIN_PIECE_CHARACTERS:
        pieces[-1] += current
    elif len(current.strip()) >= MIN_PIECE_CHARACTERS:
        pieces.append(current)
    return [stripped for piece in pieces if (stripped := piece.strip("\n").rstrip())]


def _paragraphs(text: str) -> Iterator[str]:
    """Runs of lines up to and including an empty one, less those that are a notice in a comment."""
    paragraph: list[str] = []
    for line in [*text.split("\n"), ""]:
        paragraph.append(line)
        if _BORDER.fullmatch(line):
            joined = "\n".join(paragraph) + "\n"
            is_notice = joined.lstrip().startswith(("#", "/", "*")) and _LICENCE.search(joined)
            if not is_notice:
                yield joined
            paragraph = []


def _lines_within(paragraph: str, size: int) -> Iterator[str]:
    for line in paragraph.splitlines(keepends=True):
        yield from (line[start : start + size] for start in range(0, len(line), size))


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "python_functions",
            "functions of Python's standard library, asked for by name and docstring",
            "PSF-2.0",
            read_python_functions,
        ),
        Source("cpp_headers", "hand-written C++ headers of the installed torch", "BSD-3-Clause", read_cpp_headers),
        Source(
            "english_reference",
            "English prose of the Python language reference",
            "PSF-2.0",
            read_english_reference,
        ),
        Source("cmake", "CMake modules of the installed torch", "BSD-3-Clause and MIT", read_cmake),
    )
}


# Reading by name


def choose_evenly(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` examples, as even over the documents as their sizes allow, and in the order given.

    With more documents than `limit`, evenly spaced documents give one example each. Otherwise every document
    gives the same number, less where it has fewer. Within a document the choice is evenly spaced as well.
    """
    documents: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        documents.setdefault(example.document, []).append(index)
    groups = _spaced(list(documents.values()), limit)
    chosen: list[int] = []
    room = limit
    for done, group in enumerate(sorted(groups, key=len)):  # small ones first: what they leave goes to the others
        share = min(len(group), room // (len(groups) - done))
        chosen += _spaced(group, share)
        room -= share
    return [examples[index] for index in sorted(chosen)]


def _spaced(items: list, count: int) -> list:
    """`count` items from the middles of equal stretches; all of them where there are no more."""
    if len(items) <= count:
        return items
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def source_name(name: str) -> str:
    """The dataset's name: a built-in source's own, or the stem of a path that ends in `.jsonl`.

    Raises ValueError for a path where no file is, and for any other name, with the nearest known one.
    """
    if name in SOURCES:
        return name
    if name.endswith(".jsonl"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"there is no file {str(path)!r}; give the path of a local .jsonl file")
        return path.stem
    nearest = difflib.get_close_matches(name.lower(), SOURCES, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown dataset {name!r}; the nearest known one is {nearest!r}. "
        f"Known are {', '.join(SOURCES)}, and any path that ends in .jsonl"
    )


def read_source(name: str) -> Reading:
    """Read a built-in source by its name, or a local `.jsonl` file by its path.

    A line of the file is `{"text": ...}` (plain text) or `{"prompt": ..., "response": ...}`; other fields are
    ignored, empty lines skipped, and every line is a document of its own. Raises ValueError for an unknown
    name, a file that cannot be read, and a source or file with no usable example.
    """
    known = source_name(name)
    if name not in SOURCES:
        return _read_jsonl(Path(name).expanduser(), known)
    found = list(SOURCES[name].read())
    if not found:
        raise ValueError(f"the source {name!r} ({SOURCES[name].description}) has no text on this machine; leave it out")
    chosen = choose_evenly(found, MAX_EXAMPLES_PER_SOURCE)
    return Reading(name, chosen, len(found) - len(chosen), 0, None)


def _read_jsonl(path: Path, name: str) -> Reading:
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"cannot read the dataset {str(path)!r}: {error.strerror}") from error
    examples: list[Example] = []
    malformed, first_malformed = 0, None
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        document = f"{path.name}:{number}"
        try:
            prompt, response = _row_of(line)
        except ValueError as error:
            malformed += 1
            first_malformed = first_malformed or f"{document}: {error}"
        else:
            examples.append(Example(prompt, response, document))
    if not examples:
        raise ValueError(
            f"{str(path)!r} has no usable row: each line must be a JSON object with a non-empty text, or with a "
            f"non-empty prompt and response (first malformed line: {first_malformed or 'none, it is empty'})"
        )
    return Reading(name, examples, 0, malformed, first_malformed)


def _row_of(line: bytes) -> tuple[str | None, str]:
    """(prompt or None, response) of one line; ValueError says in a few words what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("not an object")
    if "text" in row and ("prompt" in row or "response" in row):
        raise ValueError("both text and prompt or response")
    if "text" in row:
        return None, _field(row, "text")
    return _field(row, "prompt"), _field(row, "response")


def _field(row: dict, field: str) -> str:
    if field not in row:
        raise ValueError(f"no {field}")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{field} is not a string")
    if not value.strip():
        raise ValueError(f"{field} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{field} holds half a surrogate pair")
    return value
