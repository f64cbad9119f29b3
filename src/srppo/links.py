"""Writing below a folder and nowhere else: links that would lead a write out of it are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from srppo.errors import RunFolderError

FOLDERS = ("stages", "evaluation", "checkpoints", "sft_checkpoints", "plots", "profile", "critic", "sft", "policy", "sft_continued", "vllm")


def refuse_links(folder: Path) -> None:
    """Raise a RunFolderError for a symbolic link in a run folder where srppo writes: someone else's folder could lead it anywhere.

    The folder itself may be a link, and so may what lies beside srppo's own files.
    """
    for path in _written(folder):
        if path.is_symlink():
            raise RunFolderError(
                f"{path}: is a link (to {os.readlink(path)}), and srppo writes through none inside a run folder; put the file or folder "
                "itself there, or choose another --output"
            )


def _written(folder: Path) -> Iterator[Path]:
    """Paths that srppo writes to: files at the top, its folders, and what lies in those."""
    own = [folder / name for name in FOLDERS]
    yield from own
    if folder.is_dir():
        yield from (p for p in folder.iterdir() if p.suffix in (".json", ".jsonl", ".yaml", ".html") or p.name == ".lock")
    for inner in own:
        if inner.is_dir():
            yield from (p for p in inner.iterdir() if p.is_dir() or p.suffix in (".json", ".jsonl"))


def open_here(path: Path, flags: int, mode: int = 0o666) -> int:
    """os.open that follows no link at the path itself: an OSError (ELOOP) instead. Where a system has no such flag it is as os.open."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), mode)
