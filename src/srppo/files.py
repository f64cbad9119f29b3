"""Writing files so that a crash or a full disk leaves the old one or the new one, and reading JSON back with errors that say where."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from srppo.errors import RunFolderError
from srppo.links import open_here
from srppo.world import world

_ADVICE = {
    errno.ENOSPC: "no space is left on the device; free some, or choose another --output; then continue with --resume",
    errno.EDQUOT: "your disk quota is used up; free some space, or choose another --output; then continue with --resume",
    errno.EROFS: "the file system is read-only; choose another --output",
    errno.EACCES: "permission denied; choose an --output that you may write to",
    errno.EPERM: "the operation is not permitted; choose an --output that you may write to",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another --output",
    errno.ELOOP: "it is a link, and srppo writes through none inside a run folder; put the file itself there",
    errno.EEXIST: "a file of this name is in the way; choose another --output",
}


@contextlib.contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Inside it an OSError becomes a RunFolderError that names the path and what to do."""
    try:
        yield
    except OSError as error:
        reason = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise RunFolderError(f"cannot write {path}: {reason}") from error


def write_bytes(path: str | Path, content: bytes) -> None:
    """Atomic: a temporary file beside it, fsync, rename, fsync of the folder. Raises RunFolderError; no temporary file stays.

    Of several processes rank 0 alone writes; the others return at once.
    """
    if not world().main:
        return
    path = Path(path)
    with write_errors(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp makes private files; results are shared like any other file
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def sync_folder(path: str | Path) -> None:
    """Flush a folder's list of names to the disk, so that what was written and renamed in it survives a power failure."""
    if os.name == "nt":  # which opens no folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: str | Path) -> None:
    """Flush a file to the disk."""
    handle = os.open(path, os.O_RDWR)  # Windows flushes what may be written only
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: str | Path) -> None:
    """Flush a folder with all that is in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(os.path.join(place, name))
        sync_folder(place)


def share_tree(folder: str | Path) -> None:
    """Give the files in a folder the permissions of new ones: safetensors makes private ones, and others are to read what was made."""
    for place, _, names in os.walk(folder):
        for name in names:
            os.chmod(os.path.join(place, name), 0o666 & ~current_umask())


def write_json(path: str | Path, content: Any) -> None:
    """Atomic; NaN and infinity become null."""
    write_bytes(path, (json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def write_lines(path: str | Path, records: list[dict[str, Any]]) -> None:
    """A whole jsonl file, atomic."""
    write_bytes(path, _lines(records))


def append_lines(path: str | Path, records: list[dict[str, Any]]) -> None:
    """Add records to a jsonl file. Where that fails the file keeps its old length: no half line. Rank 0 alone writes."""
    if not world().main:
        return
    content = _lines(records)
    # Unbuffered: a buffer would write what is left of a refused line when the file is closed, after the truncation.
    with write_errors(path), open(path, "ab", buffering=0, opener=_no_link) as stream:
        size, written = stream.tell(), 0
        try:
            while written < len(content):
                written += stream.write(content[written:])
        except BaseException:  # also Ctrl-C in the middle
            os.truncate(path, size)
            raise


def repair_lines(path: str | Path) -> None:
    """Drop a last line that a crash cut off, so that the next record does not continue it."""
    path = Path(path)
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        write_lines(path, read_lines(path))


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files and folders of a process that was killed while it wrote into this folder.

    Killed between the two renames that replace a folder, it has left the old one inside `.name.….old`: that is put back.
    Raises RunFolderError where the system refuses.
    """
    for leftover in [p for p in sorted(folder.glob(".*")) if p.suffix in (".tmp", ".part", ".partial", ".old")]:
        with write_errors(leftover):
            target = folder / leftover.name[1:].rsplit(".", 2)[0]
            if leftover.suffix == ".old" and (leftover / "old").exists() and not target.exists():
                os.replace(leftover / "old", target)
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a jsonl file of ours; [] without the file. A last line cut off by a crash is left out.

    Raises RunFolderError, with the line number, for damage anywhere else.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror or error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # no newline after it
                break
            raise RunFolderError(f"{path}, line {number}: damaged (not JSON); delete that line to go on without it") from None
        if not isinstance(record, dict):
            raise RunFolderError(f"{path}, line {number}: damaged (not a JSON object); delete that line to go on without it")
        records.append(record)
    return records


def read_json(path: str | Path) -> Any:
    """The content of a JSON file of ours. Raises RunFolderError if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file; the run did not get so far, or this is not a run folder") from None
    except (ValueError, OSError, RecursionError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error})") from None


def plain(value: Any) -> Any:
    """value as JSON can hold it: torch and numpy values unpacked, NaN and infinity to None, tuples and sets to lists, the rest to str."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def _no_link(path: str, flags: int) -> int:
    return open_here(Path(path), flags)


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(plain(r), ensure_ascii=False) + "\n" for r in records).encode("utf-8", "replace")


def current_umask() -> int:
    """The permissions that new files do not get."""
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    current = os.umask(0o077)  # it can only be read by setting it: for a moment stricter than any, never looser
    os.umask(current)
    return current
