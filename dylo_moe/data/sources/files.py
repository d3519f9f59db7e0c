"""Read local files as raw rows, one at a time, with a reason for each that is broken.

A raw row still holds the bytes of a JSON object, which are parsed later, on all cores. So a broken row costs only
itself, not its file, and rows of one file need not have the same columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import xxhash
from datasets import Features, Value

from dylo_moe.data.sources.examples import printable
from dylo_moe.data.sources.formats import NOT_TEXT, NOT_UTF8, NOT_UTF8_BUT_UTF16

MAX_ROW_BYTES = 8 * 2**20
"""The longest line or element that is read as a row; a longer one would be millions of tokens."""

CHUNK_BYTES = 2**20
"""The number of bytes read at once."""

TEXT_BYTES = 2**16
"""The approximate length of the raw rows into which a text file is split."""

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""The endings of files of rows that are read here, also followed by `.gz`; the `datasets` library reads parquet."""

OTHER_KINDS = (
    *(b"PK\x03\x04", b"PK\x05\x06", b"%PDF-", b"\xd0\xcf\x11\xe0", b"\x89PNG", b"GIF87a", b"GIF89a", b"\xff\xd8\xff"),
    *(b"7z\xbc\xaf", b"Rar!\x1a", b"BZh9", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1"),
)
"""The first bytes of files that are no text: zip (.xlsx, .docx), PDF, old Office, images, archives, columns."""

RAW = Features(
    {
        "raw": Value("binary"),
        "place": Value("string"),
        "document": Value("string"),
        "pieces": Value("bool"),
        "problem": Value("string"),
    }
)
"""The columns of a raw row. `raw`: a JSON object. `place`: FILE:LINE, for messages. `document`: rows with the same one
stay on one side of a split; if it is empty, the row's question or text counts. `pieces`: whether `raw` is a text to be
cut into rows. `problem`: why this is not a row, or empty."""


class LocalFile(NamedTuple):
    """A file, and its name in messages and splits."""

    name: str
    path: str

    @classmethod
    def at(cls, path: Path, name: str) -> LocalFile:
        """The file at `path`; its name may hold bytes that are not text."""
        return cls(printable(name), str(path))


def raw_row(raw: bytes, place: str, *, document: str = "", pieces: bool = False, problem: str = "") -> dict:
    """A raw row, with the columns of RAW."""
    return {"raw": raw, "place": place, "document": document, "pieces": pieces, "problem": problem}


def raw_rows(files: Sequence[tuple[str, str]], as_texts: bool) -> Iterator[dict]:
    """Yield the raw rows of files, given as (name, path).

    A file that breaks off gives the rows up to there, and one with the problem. A file whose ending is not in
    ROW_SUFFIXES is read as a text, and with `as_texts` every file is.
    """
    for name, path in files:
        try:
            with cast(io.BufferedReader, (gzip.open if name.lower().endswith(".gz") else open)(path, "rb")) as file:
                start = file.peek(8)[:8]
                if _is_utf16(start):
                    yield raw_row(b"", f"{name}:1", problem=NOT_UTF8_BUT_UTF16)
                elif start.startswith(OTHER_KINDS):
                    yield raw_row(b"", name, problem=NOT_TEXT)
                else:
                    yield from _text_rows(file, name) if as_texts else _rows_of(file, name)
        except (OSError, EOFError, zlib.error) as error:
            yield raw_row(b"", name, problem=f"the file breaks off: {error or type(error).__name__}")


def _is_utf16(start: bytes) -> bool:
    """Whether the first 8 bytes of a file are UTF-16: its mark, or every other byte is NUL, as in Latin letters."""
    halves = [part.count(0) for part in (start[::2], start[1::2])]
    return start[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) or sorted(halves) == [0, 4]


def content_key(files: Sequence[LocalFile]) -> str:
    """A hash of the files' names and bytes, and of this module, which decides how they are read.

    Raises ValueError for a file that cannot be read.
    """
    digest = xxhash.xxh3_128(Path(__file__).read_bytes())
    for file in files:
        try:
            with open(file.path, "rb") as opened:
                digest.update(f"\0{file.name}\0".encode())
                while part := opened.read(CHUNK_BYTES):
                    digest.update(part)
        except OSError as error:
            raise ValueError(f"cannot read {file.path!r}: {error.strerror}") from error
    return digest.hexdigest()


def is_row_file(name: str) -> bool:
    """Whether a file of this name holds rows, rather than a text."""
    return name.lower().removesuffix(".gz").endswith((*ROW_SUFFIXES, ".parquet"))


def _rows_of(file: BinaryIO, name: str) -> Iterator[dict]:
    kind = Path(name.lower().removesuffix(".gz")).suffix
    if kind not in ROW_SUFFIXES:
        yield from _text_rows(file, name)
    elif kind in (".csv", ".tsv"):
        yield from _table_rows(file, name, delimiter="," if kind == ".csv" else "\t")
    elif kind == ".json" and _first_text(file).startswith(b"["):
        yield from _array_rows(file, name)
    elif kind == ".json" and _first_text(file).split(b"\n", 1)[0].strip() == b"{":
        yield raw_row(b"", name, problem="one object over several lines; give an array, or an object a line")
    else:
        yield from _line_rows(file, name)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield the lines of a file without their end; None for a line that is too long."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line.removesuffix(b"\n")


_TOO_LONG = f"longer than {MAX_ROW_BYTES // 2**20} MiB"


def _line_rows(file: BinaryIO, name: str) -> Iterator[dict]:
    for number, line in enumerate(_lines(file), start=1):
        place = f"{name}:{number}"
        if line is None:
            yield raw_row(b"", place, problem=_TOO_LONG)
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield raw_row(line, place)


def _first_text(file: BinaryIO) -> bytes:
    """The beginning of a file, from its first byte that is not a space."""
    start = file.read(CHUNK_BYTES)
    file.seek(0)
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()


def _array_rows(file: BinaryIO, name: str) -> Iterator[dict]:
    """Yield the elements of one JSON array, which may be larger than memory. Nothing after a broken one can be read."""
    for index, element in enumerate(_elements(file)):
        place = f"{name}[{index}]"
        if isinstance(element, _Broken):
            yield raw_row(b"", place, problem=f"{element.reason}; the file is not read any further")
        else:
            yield raw_row(element.encode("utf-8", "surrogateescape"), place)


class _Broken(NamedTuple):
    """The reason why an array cannot be read any further."""

    reason: str


def _elements(file: BinaryIO) -> Iterator[str | _Broken]:
    decoder = json.JSONDecoder()
    # A byte that is not UTF-8 is restored when its element is encoded, so that only this element is broken.
    utf8 = getincrementaldecoder("utf-8")("surrogateescape")
    buffer, position, is_over = "", 0, False

    def read_more() -> None:
        nonlocal buffer, position, is_over
        part = file.read(max(CHUNK_BYTES, len(buffer) - position))
        is_over = not part
        buffer, position = buffer[position:] + utf8.decode(part, final=is_over), 0

    def skip_space() -> str:
        """Move on to the next character that is not a space and return it; an empty string at the end."""
        nonlocal position
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n\ufeff":
                position += 1
            if position < len(buffer) or is_over:
                return buffer[position : position + 1]
            read_more()

    assert skip_space() == "["
    position += 1
    if skip_space() == "]":
        position += 1
    else:
        while True:
            skip_space()
            try:
                _, end = decoder.raw_decode(buffer, position)
                is_whole = end < len(buffer) or is_over
            except (ValueError, RecursionError):
                is_whole = False
                if is_over or len(buffer) - position > MAX_ROW_BYTES:
                    yield _Broken("not JSON" if is_over else f"not JSON, or {_TOO_LONG}")
                    return
            if not is_whole:
                read_more()
                continue
            element, position = buffer[position:end], end
            yield element
            follows = skip_space()
            position += 1
            if follows == "]":
                break
            if follows != ",":
                yield _Broken("no comma after the previous element" if follows else "the array has no end")
                return
    if skip_space():
        yield _Broken("text after the end of the array")


def _table_rows(file: BinaryIO, name: str, *, delimiter: str) -> Iterator[dict]:
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # Values between tabs need no quotes, and a stray quote would swallow the rows up to the next one.
    reader = (
        csv.DictReader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        if delimiter == "\t"
        else csv.DictReader(text, delimiter=delimiter, strict=True)
    )
    try:
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            yield raw_row(b"", f"{name}:1", problem="two columns have the same name; the file is not read any further")
            return
        if not _is_utf8("".join(names)):
            yield raw_row(b"", f"{name}:1", problem=NOT_UTF8)
            return
        for row in reader:
            place = f"{name}:{reader.line_num}"
            if None in row:
                yield raw_row(b"", place, problem="more fields than the table has columns")
            elif not _is_utf8(fields := "".join(value or "" for value in row.values())):
                yield raw_row(b"", place, problem=NOT_UTF8)
            elif "\0" in fields:
                yield raw_row(b"", place, problem="it holds a NUL byte, which no text has")
            else:
                yield raw_row(json.dumps(row).encode(), place)
    except csv.Error as error:
        yield raw_row(
            b"", f"{name}:{reader.line_num}", problem=f"not a table: {error}; the file is not read any further"
        )


def _is_utf8(text: str) -> bool:
    """Whether a text that was decoded with "surrogateescape" has no byte that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_rows(file: BinaryIO, name: str) -> Iterator[dict]:
    """Yield a text in parts of about TEXT_BYTES, each of whole lines."""
    part: list[bytes] = []
    size = 0
    first = 1
    for number, line in enumerate(_lines(file), start=1):
        if line is None or b"\0" in line:
            yield raw_row(b"", name, problem=f"not text, or a line {_TOO_LONG}" if line is None else NOT_TEXT)
            return
        part.append(line)
        size += len(line) + 1
        if size >= TEXT_BYTES:
            yield _part_row(part, name, first)
            part, size, first = [], 0, number + 1
    if part:
        yield _part_row(part, name, first)


def _part_row(lines: list[bytes], name: str, first: int) -> dict:
    """The row of some lines of a text, of which the first one has the number `first`."""
    raw = b"\n".join(lines)
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return raw_row(b"", f"{name}:{first + raw.count(10, 0, error.start)}", problem=NOT_UTF8)
    return raw_row(raw, name, document=name, pieces=True)
