"""Read training data in the formats people have: chat JSONL, alpaca, sharegpt, completions, text, tables, hub sets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shoestring.core.errors import UsageError, nearest
from shoestring.data import builtin
from shoestring.data.corpus import Corpus, Example
from shoestring.data.rows import SHAPES, BadRow, example_of_row, shape_of_row

MAX_LINE = 16 * 2**20
# A gzip file of real text unpacks to 3-20 times its size; far beyond that it is made to fill the memory.
MAX_UNPACKING, SMALL_ENOUGH = 100, 64 * 2**20
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")

_Item = tuple[int, Any]  # line number and row, or the BadRow found in its place


def read(source: str | Path, *, format: str | None = None, skip_bad: int = 0, limit: int | None = None) -> Corpus:
    """Read examples from a file, a Hugging Face dataset id (`owner/name`), or the built-in set `python-docs`.

    The format is found by the keys of the first good line and holds for the whole file.

    Args:
        format: chat, alpaca, sharegpt, completion or text; refuses rows of any other shape.
        skip_bad: how many bad lines may be left out; they are listed in `Corpus.skipped`.
        limit: stop after this many good examples.

    Raises:
        UsageError: nothing there, unknown format, no examples, or more bad lines than `skip_bad`; names file,
            line and reason.
    """
    name = str(source)
    if format is not None and format not in SHAPES:
        raise UsageError(f"data format {format} is unknown", remedy=nearest(format, SHAPES))
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} leaves no examples", remedy="Give a limit of 1 or more")
    if name == builtin.NAME:
        return Corpus(builtin.python_docs()[:limit], builtin.NAME, source=builtin.NAME)
    items = _items(name, limit)
    return _collect(items, name, format, skip_bad, limit)


def rows(source: str | Path) -> Iterator[_Item]:
    """(line number, row) one after another, whatever the keys; in place of a bad row the reason. Tables are read whole.

    Raises:
        UsageError: as `read`, for the source as such.
    """
    return _items(str(source), 1)


def lines(path: Path | str) -> Iterator[tuple[int, str | BadRow]]:
    """(line number, line without its end) of a text file, packed by gzip or not.

    Raises:
        UsageError: there is no such file, or it is not whole.
    """
    path = Path(path)
    try:
        return _lines(_open(path, path.suffix == ".gz"))
    except OSError as error:
        raise UsageError(f"data file {path} cannot be read", str(error)) from None


def _collect(items: Iterator[_Item], name: str, shape: str | None, skip_bad: int, limit: int | None) -> Corpus:
    examples: list[Example] = []
    skipped: list[str] = []
    first = 0
    for line, row in items:
        try:
            if isinstance(row, BadRow):
                raise row
            found = shape_of_row(row)
            if shape not in (None, found):
                there = f"line {first} is" if first else "the format asked for is"
                raise BadRow(f"is of the format {found}, but {there} {shape}; a file holds one format")
            example = example_of_row(row, found, line)
        except BadRow as bad:
            skipped.append(f"{name}:{line}: {bad}")
            if len(skipped) > skip_bad:
                raise _too_many(skipped, skip_bad) from None
            continue
        if shape is None or not first:
            shape, first = found, line
        examples.append(example)
        if limit is not None and len(examples) == limit:
            break
    if not examples:
        why = f"all {len(skipped)} lines are bad, the first: {skipped[0]}" if skipped else "it is empty"
        raise UsageError(f"{name} holds no examples", why, "Give a file with at least one example")
    return Corpus(examples, shape or "", skipped, name)


def _too_many(skipped: list[str], skip_bad: int) -> UsageError:
    if not skip_bad:
        return UsageError(skipped[-1], remedy="Mend the line, or allow some to be left out with --skip-bad N")
    lines = "\n  ".join(skipped[:5] + (["..."] if len(skipped) > 6 else []) + skipped[5:][-1:])
    return UsageError(
        f"more than {skip_bad} bad lines:\n  {lines}", remedy="Mend the file, or allow more with --skip-bad N"
    )


def _items(name: str, limit: int | None) -> Iterator[_Item]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _saved_dataset(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:] or [""]
    if not path.exists():
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", name) and suffix[0] not in SUFFIXES:
            return _hub(name, limit)
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        remedy = nearest(path.name, beside) if 0 < len(beside) <= 50 else ""
        raise UsageError(f"data file {name} does not exist", remedy=remedy or "Check the path")
    if not path.is_file():
        raise UsageError(
            f"data file {name} is a pipe or a device", "it would be waited for", "Write it to a file first"
        )
    if suffix[0] not in SUFFIXES:
        raise UsageError(
            f"data file {name} has the unknown ending {path.suffix or '(none)'}",
            remedy=f"Known: {', '.join(SUFFIXES)}, each also with .gz except .parquet",
        )
    try:
        if suffix[0] == ".parquet":
            return _parquet(path)
        stream = _open(path, packed)
        if suffix[0] in (".jsonl", ".ndjson"):
            return _json_lines(_lines(stream))
        if suffix[0] == ".json":
            return _json_file(stream, name)
        if suffix[0] in (".csv", ".tsv"):
            return _table(stream, name, "\t" if suffix[0] == ".tsv" else ",")
        return _paragraphs(_lines(stream))
    except OSError as error:
        raise UsageError(f"data file {name} cannot be read", str(error)) from None


class _Guarded(io.RawIOBase):
    """A gzip stream that stops a bomb before it fills the memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream = gzip.GzipFile(path)
        self.left = max(SMALL_ENOUGH, MAX_UNPACKING * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{self.path} is not a whole gzip file", str(error), "Unpack it with gunzip") from None
        self.left -= len(data)
        if self.left < 0:
            raise UsageError(
                f"{self.path} unpacks to more than {MAX_UNPACKING} times its size",
                "that is far more than text does, so it is refused",
                "Unpack it with gunzip if you trust it",
            )
        buffer[: len(data)] = data
        return len(data)


def _open(path: Path, packed: bool) -> BinaryIO:
    return io.BufferedReader(_Guarded(path), 2**20) if packed else path.open("rb")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, str | BadRow]]:
    """Numbered lines without their ends; bounded in memory whatever the file holds."""
    with stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE)
                yield number, BadRow(f"is longer than {MAX_LINE // 2**20} MiB, the longest a line may be")
                continue
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise _encoding("UTF-16", getattr(stream, "name", "the data file"))
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, _decode(line)


def _decode(line: bytes) -> str | BadRow:
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return BadRow(
            f"is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); "
            "if the file is Latin-1, convert it: iconv -f latin1 -t utf-8 FILE"
        )


def _encoding(found: str, name: Any) -> UsageError:
    return UsageError(f"{name} is {found}, not UTF-8", remedy=f"Convert it: iconv -f {found.lower()} -t utf-8 FILE")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow(f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"is not JSON that can be read: {error}")


def _json_lines(lines: Iterator[tuple[int, str | BadRow]]) -> Iterator[_Item]:
    for number, line in lines:
        if isinstance(line, BadRow):
            yield number, line
        elif line.strip():
            yield number, _json(line)


def _json_file(stream: BinaryIO, name: str) -> Iterator[_Item]:
    """A list of rows, an object that holds one, or lines of JSON in a file of the wrong ending."""
    text = _whole(stream, name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _json_lines((number, line) for number, line in enumerate(text.split("\n"), 1))
        raise UsageError(f"{name}:{error.lineno}: is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON that can be read", str(error)) from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        try:
            shape_of_row(value)
            value = [value]
        except BadRow:
            value = lists[0] if len(lists) == 1 else [value]
    return iter(enumerate(value, 1)) if isinstance(value, list) else iter([(1, value)])


def _table(stream: BinaryIO, name: str, delimiter: str) -> Iterator[_Item]:
    """Rows by header; a row that spans lines is known by its last one."""
    text = _whole(stream, name)

    def rows() -> Iterator[_Item]:
        before = csv.field_size_limit(MAX_LINE)
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            header = list(reader.fieldnames or ())
            twice = next((column for column in header if header.count(column) > 1), None)
            if twice is not None:
                raise UsageError(
                    f"{name}:1: the header names the column {twice!r} twice", "only one of them would be read",
                    "Give each column a name of its own",
                )  # fmt: skip
            for row in reader:
                if None in row:
                    yield reader.line_num, BadRow("has more cells than the header")
                else:
                    yield reader.line_num, {key: value for key, value in row.items() if value not in (None, "")}
        except csv.Error as error:
            raise UsageError(f"{name}:{reader.line_num}: is not a table: {error}") from None
        finally:
            csv.field_size_limit(before)

    return rows()


def _whole(stream: BinaryIO, name: str) -> str:
    with stream:
        data = stream.read()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _encoding("UTF-16", name)
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad = _decode(data[data.rfind(b"\n", 0, error.start) + 1 :].split(b"\n", 1)[0])
        raise UsageError(f"{name}:{line}: {bad}") from None


def _paragraphs(lines: Iterator[tuple[int, str | BadRow]]) -> Iterator[_Item]:
    """Plain text: each paragraph, up to a blank line, is one example, known by its first line."""
    start = 0
    paragraph: list[str] = []
    for number, line in lines:
        if isinstance(line, BadRow):
            yield number, line
        elif line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield start, {"text": "\n".join(paragraph)}
            paragraph = []
    if paragraph:
        yield start, {"text": "\n".join(paragraph)}


def _parquet(path: Path) -> Iterator[_Item]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{path} is not a whole Parquet file", str(error)) from None


def _saved_dataset(path: Path) -> Iterator[_Item]:
    import datasets

    if not (path / "state.json").is_file():
        files = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        remedy = f"Name one of its files: {', '.join(files[:5])}" if files else "Name a data file"
        raise UsageError(f"{path} is a folder that no dataset was saved to", remedy=remedy)
    try:
        return iter(enumerate(datasets.load_from_disk(str(path)), 1))
    except Exception as error:
        raise UsageError(f"the dataset in {path} cannot be read", f"{type(error).__name__}: {error}") from None


def _hub(name: str, limit: int | None) -> Iterator[_Item]:
    import datasets

    identity, _, part = name.partition(":")
    part = part or "train"
    try:
        rows = datasets.load_dataset(identity, split=part, streaming=limit is not None)
    except Exception as error:
        raise UsageError(
            f"{name} is no file here, and the dataset cannot be had from the hub",
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no reason given'}",
            "Check the path or the id; offline, download it first and give the file (.jsonl, .parquet, .csv)",
        ) from None
    return iter(enumerate(rows, 1))
