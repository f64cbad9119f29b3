"""Where rows come from: a file, a folder, a data set saved by `datasets`, or a hub id. Rows keep their place for error messages."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srppo.data.files import READERS, Rows
from srppo.errors import DataError

SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # file names that mean a split
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Rows and where each stands. lines[i] is the 1-based line of row i in files[i], None where the format has no lines."""

    path: str
    rows: list[dict[str, Any]]
    lines: list[int | None]
    files: list[str]

    def place(self, row: int) -> str:
        """`line 12` or `row 12`, counted from 1; with the file's name where the source has several."""
        name = "" if self.files[0] == self.files[-1] else f"{Path(self.files[row]).name} "
        line = self.lines[row]
        return f"{name}row {self._number(row)}" if line is None else f"{name}line {line}"

    def error(self, message: str, row: int) -> DataError:
        """A DataError that names the file and the line (or row)."""
        if self.lines[row] is not None:
            return DataError(message, self.files[row], self.lines[row])
        return DataError(f"row {self._number(row)}: {message}", self.files[row])

    def _number(self, row: int) -> int:
        return self.files[: row + 1].count(self.files[row])


def read_rows(source: str, split: str = "train") -> Source:
    """All rows of a source, as dicts.

    source: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file; a folder saved by `datasets` (Dataset or DatasetDict); a folder
    of such files; or a hub id, `owner/name` or `owner/name:configuration`. split chooses among the splits of a DatasetDict, of a
    hub data set, or of a folder whose files are named after splits; a single file has none, and it is ignored.
    Raises DataError: missing (with the nearest name beside it), empty, unreadable, broken at line N, unknown split.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~name of a user who does not exist
        raise DataError(f"no such folder: {error}", source) from None
    try:
        if path.is_file():
            rows = _read_file(path)
        elif path.is_dir():
            rows = _read_folder(path, split)
        elif _looks_like_path(source):
            raise DataError(_missing(path), source)
        else:
            rows = read_hub(source, split)
    except OSError as error:  # a name that is too long, a folder that may not be listed
        raise DataError(f"cannot be read: {error.strerror or error}", source) from error
    if not rows:
        raise DataError("holds no rows", source)
    return Source(source, [r for r, _, _ in rows], [line for _, line, _ in rows], [file for _, _, file in rows])


def _looks_like_path(source: str) -> bool:
    if source.startswith((".", "/", "~")) or Path(source).suffix.lower() in READERS or HUB_ID.fullmatch(source) is None:
        return True
    return "/" in source and Path(source).parent.is_dir()  # data/gsmk beside data/gsm8k is a slip, not a hub id


def _missing(path: Path) -> str:
    """Why a path is not there, with the nearest name that is."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.parent.is_dir():
            parent = parent.parent
        return f"no such file: the folder {parent} does not exist{_nearest(parent)}"
    return f"no such file or folder{_nearest(path)}"


def _nearest(path: Path) -> str:
    names = sorted(p.name for p in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {path.parent / close[0]}?"
    listed = ", ".join([n for n in names if not n.startswith(".")][:8])
    return f"; {path.parent} holds {listed or 'nothing'}"


def _read_file(path: Path) -> Rows:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"unknown kind of file {path.suffix!r}; known are {', '.join(READERS)}", path)
    try:
        if path.stat().st_size == 0:
            raise DataError("the file is empty", path)
        return reader(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", path) from error


def _read_folder(folder: Path, split: str) -> Rows:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _read_saved(folder, split)
    files = _data_files(folder) or _data_files(folder / "data")
    if not files:
        raise DataError(f"the folder holds no data file ({', '.join(READERS)}) and was not saved by `datasets`", folder)
    named = {file: _split_of(file) for file in files}
    known = sorted({s for s in named.values() if s})
    if split in known:  # never mix train.jsonl with the test.jsonl beside it
        files = [f for f in files if named[f] == split]
    elif known:
        raise DataError(f"no split {split!r}; found {', '.join(known)}", folder)
    return [row for file in files for row in _read_file(file)]


def _data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in READERS) if folder.is_dir() else []


def _split_of(file: Path) -> str | None:
    """The split a file's name starts with: train.jsonl, test-00000-of-00001.parquet."""
    word = re.split(r"[-_.]", file.name, maxsplit=1)[0].lower()
    return word if word in SPLITS else None


def _read_saved(folder: Path, split: str) -> Rows:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # many kinds, all of them a damaged folder
        raise DataError(f"`datasets` cannot load the folder: {type(error).__name__}: {error}", folder) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"no split {split!r}; found {', '.join(data)}", folder)
        data = data[split]
    try:
        data.data.validate(full=True)  # Arrow trusts a file's offsets
        rows = data.to_list()
    except Exception as error:  # as above
        raise DataError(f"`datasets` cannot read the folder: {type(error).__name__}: {error}", folder) from error
    return [(row, None, str(folder)) for row in rows]


def read_hub(source: str, split: str) -> Rows:
    """Rows of a hub data set, through `datasets.load_dataset` and its cache. Raises DataError where it is unknown or out of reach."""
    import datasets

    name, _, configuration = source.partition(":")
    try:
        data = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub, the network and `datasets` fail in many ways; the cause is kept and shown
        raise DataError(
            f"no such file or folder here, and `datasets` cannot load it from the hub: {type(error).__name__}: {error}. "
            "Check the spelling and the network, or give a local file (a configuration is chosen as name:configuration)",
            source,
        ) from error
    return [(row, None, source) for row in data.to_list()]
