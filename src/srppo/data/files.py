"""Readers of single files. Each returns (row, line, file) triples and raises DataError with the line that is wrong."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from srppo.data.messages import kind
from srppo.errors import DataError

Rows = list[tuple[dict[str, Any], int | None, str]]  # row, 1-based line (None where the format has none), file


def read_text(path: Path) -> str:
    """The file as UTF-8 (a byte order mark is dropped). Raises DataError with the line of the first byte that is not."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 (byte 0x{raw[error.start]:02x}); convert it, for example with `iconv -f latin1 -t utf-8`"
        raise DataError(message, path, line) from None


def read_jsonl(path: Path) -> Rows:
    """One JSON object a line; blank lines are skipped."""
    text = read_text(path)
    rows: Rows = []
    # Not splitlines(): JSON strings may hold U+2028 and other separators it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(_reason(error) + ("" if rows else _one_document_hint(text)), path, number) from None
            rows.append((_object(value, path, number), number, str(path)))
    return rows


def _reason(error: ValueError | RecursionError) -> str:
    """Why the json module gave up."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON at column {error.colno}: {error.msg}"
    if isinstance(error, RecursionError):
        return "JSON with lists or objects nested too deeply to be read"
    return f"JSON with an integer of more than {sys.get_int_max_str_digits()} digits, too long to be read"


def _one_document_hint(text: str) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return ". The file is one JSON document, not one object a line: name it .json"


def read_json(path: Path) -> Rows:
    """A list of objects, or an object with such a list under `data` (or under its only key). JSON lines named .json are read too."""
    text = read_text(path)
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        return _list_rows(text, start, path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second document follows the first: JSON lines
            return read_jsonl(path)
        raise DataError(_reason(error), path, error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise DataError(_reason(error), path, text.count("\n", 0, start) + 1) from None  # where the document begins
    if isinstance(value, dict):
        items = value.get("data", next(iter(value.values())) if len(value) == 1 else None)
        if isinstance(items, list):
            return [(_object(item, path, None, f"item {i}"), None, str(path)) for i, item in enumerate(items, start=1)]
        raise DataError(f'expected a list of objects, or {{"data": [...]}}; found an object with the keys {", ".join(value)}', path)
    raise DataError(f"expected a list of objects, found {kind(value)}", path)


def _list_rows(text: str, start: int, path: Path) -> Rows:
    """The items of a JSON list one by one, so that each keeps its line."""
    decoder = json.JSONDecoder()
    rows: Rows = []
    line, counted = 1, 0
    position = _skip(text, start + 1)
    try:
        while text[position : position + 1] != "]":
            if rows:
                if text[position : position + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
                position = _skip(text, position + 1)
            line, counted = line + text.count("\n", counted, position), position
            value, position = decoder.raw_decode(text, position)
            rows.append((_object(value, path, line), line, str(path)))
            position = _skip(text, position)
        if text[position + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, _skip(text, position + 1))
    except (ValueError, RecursionError) as error:
        raise DataError(_reason(error), path, getattr(error, "lineno", line)) from None
    return rows


def _skip(text: str, position: int) -> int:
    """The first position from here on that is not JSON white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def read_csv(path: Path) -> Rows:
    """Comma- or (.tsv) tab-separated values with a header line. All values are strings."""
    text = read_text(path)
    csv.field_size_limit(sys.maxsize)  # Python's default of 131072 characters is less than a long answer
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    rows: Rows = []
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"the header names a column twice: {', '.join(header)}", path, 1)
        line = reader.line_num + 1  # a quoted value may span lines: a row is named by its first
        for values in reader:
            if values and len(values) != len(header):
                raise DataError(f"{len(values)} values, but the header has {len(header)} columns ({', '.join(header)})", path, line)
            if values:
                rows.append((dict(zip(header, values)), line, str(path)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"broken CSV: {error}", path, line) from None
    return rows


def read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, *_ODD) as error:
        raise DataError(f"not a readable parquet file: {error}", path) from error
    return _table_rows(table, path)


def read_arrow(path: Path) -> Rows:
    """An Arrow stream (what `datasets` writes) or file."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                table = pyarrow.ipc.open_stream(mapped).read_all()
            except pyarrow.ArrowInvalid:
                mapped.seek(0)
                table = pyarrow.ipc.open_file(mapped).read_all()
            return _table_rows(table, path)
    except (pyarrow.ArrowException, *_ODD) as error:
        raise DataError(f"not a readable arrow file: {error}", path) from error


_ODD = (ValueError, OverflowError, KeyError, TypeError)  # a date beyond Python's, text that is no UTF-8: what Arrow says in other ways


def _table_rows(table: Any, path: Path) -> Rows:
    """An Arrow table's rows. Its offsets are checked first: Arrow itself trusts them, and would read any memory they point to."""
    import pyarrow

    try:
        names = table.column_names
        if len(set(names)) != len(names):
            raise DataError(f"the table names a column twice: {', '.join(names)}", path)
        table.validate(full=True)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, *_ODD) as error:
        raise DataError(f"holds values that cannot be read: {type(error).__name__}: {error}", path) from error
    return [(row, None, str(path)) for row in rows]


def _object(value: Any, path: Path, line: int | None, item: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise DataError(f"{item + ': ' if item else ''}expected an object with fields, found {kind(value)}", path, line)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
