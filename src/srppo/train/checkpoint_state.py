"""state.json of a checkpoint, by which its damage is noticed, and the folders that checkpoints lie in."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srppo.errors import RunFolderError

FORMAT = 2  # 1 was a safetensors file a group, without checksums
STATE = "state.json"
PIECE = 1 << 22  # bytes read at once


class DamagedCheckpoint(RunFolderError):
    """A checkpoint that is not whole; `reason` says what is wrong."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = path, reason
        super().__init__(f"{path}: damaged checkpoint ({reason}); delete this folder to continue from the one before it")

    def __reduce__(self) -> tuple[type[DamagedCheckpoint], tuple[Path, str]]:
        return type(self), (self.path, self.reason)  # between processes


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def named_steps(folder: Path) -> list[int]:
    """Of all folders named like a checkpoint, ascending."""
    found = (p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*") if p.is_dir())
    return sorted(int(s) for s in found if s.isdigit())


def saved_steps(folder: Path) -> list[int]:
    """Steps with a checkpoint that was once whole, ascending."""
    return [step for step in named_steps(folder) if (checkpoint_path(folder, step) / STATE).is_file()]


def state_text(content: Mapping[str, Any]) -> bytes:
    """state.json, with the checksum that `read_state` expects."""
    return json.dumps({"format": FORMAT, **content, "checksum": _checksum(content)}, indent=1).encode()


def read_state(path: Path) -> dict[str, Any]:
    """{"step", "groups", "files", "state", …} of a checkpoint. Raises DamagedCheckpoint, and RunFolderError for one of another version."""
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        version = content.pop("format", 1)
        if version != FORMAT and isinstance(content.get("step"), int):
            raise RunFolderError(
                f"{path}: written by {'an older' if version == 1 else 'another'} version of srppo, which this one cannot continue; "
                "finish the run with that version, or begin anew with --overwrite"
            )
        whole = content.pop("checksum") == _checksum(content) and all(Path(name).name == name for name in content["files"])
    except FileNotFoundError:
        raise DamagedCheckpoint(path, f"{STATE} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedCheckpoint(path, f"{STATE} cannot be read: {error}") from error
    if not whole:
        raise DamagedCheckpoint(path, f"the checksum of {STATE} is wrong")
    return dict(content)


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def damage(path: Path, files: Mapping[str, Mapping[str, int]]) -> str | None:
    """What is wrong with files in a folder of which sizes and checksums are known; None: nothing."""
    return next((reason for name, known in files.items() if (reason := _damage(path / name, known))), None)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there, and every byte of it as it was written."""
    try:
        return damage(path, read_state(path)["files"]) is None
    except RunFolderError:
        return False


def _damage(path: Path, known: Mapping[str, int]) -> str | None:
    try:
        if (size := path.stat().st_size) != known["bytes"]:
            return f"{path.name} has {size} bytes, not {known['bytes']}"
        crc32 = 0
        with open(path, "rb", buffering=0) as stream:
            while piece := stream.read(PIECE):
                crc32 = zlib.crc32(piece, crc32)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None if crc32 == known["crc32"] else f"the checksum of {path.name} is wrong"


def drop(path: Path) -> None:
    """Delete a checkpoint: at whatever moment the process is killed, it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def drop_old(folder: Path, step: int, keep: int) -> None:
    """All but the last `keep` up to `step`. Those of later steps too: the run has gone back behind them, as they were damaged."""
    known = saved_steps(folder)
    kept = [s for s in known if s <= step][-keep:]
    for old in known:
        if old not in kept:
            drop(checkpoint_path(folder, old))


def sweep(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote or deleted a checkpoint."""
    for rubbish in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(rubbish, ignore_errors=True)
