"""The run folder: the one place a run writes to, locked for one process, never left half-written.

docs/run-folder.md describes every file. This module knows names and rules of access; what the files mean is their writers' affair.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from srppo.environment import environment, version
from srppo.errors import RunFolderError
from srppo.files import (
    append_lines,
    plain,
    read_json,
    read_lines,
    remove_unfinished,
    repair_lines,
    write_bytes,
    write_errors,
    write_json,
    write_lines,
)
from srppo.links import open_here, refuse_links
from srppo.outcomes import read_environment
from srppo.run_config import refuse_changes
from srppo.world import world

if sys.platform != "win32":  # there: no lock, the rest works
    import fcntl

MARK = "# srppo run"  # begins the config.yaml of every run folder; `overwrite` deletes no folder without it
LOCK = ".lock"
LOGS = ("metrics.jsonl", "samples.jsonl")
# Keys that change speed, place or housekeeping but not what is computed (batch widths: beyond float rounding).
HARMLESS = frozenset(
    {
        "output",
        "threads",
        "profile",
        "parallel",
        "background_checkpoints",
        "model.device",
        "model.gradient_checkpointing",
        "model.offload_frozen",
        "model.compile",
        "sft.micro_batch_tokens",
        "sft.checkpoint_every",
        "rollout.batch_size",
        "rollout.cuda_graphs",
        "rollout.merge_adapters",
        "rollout.server",
        "rollout.shared_folder",
        "rollout.memory",
        "ppo.entropy",
        "ppo.micro_batch_tokens",
        "ppo.max_skipped_steps",
        "ppo.checkpoint_every",
        "ppo.keep_checkpoints",
        "evaluation.batch_size",
    }
)


def is_run(path: str | Path) -> bool:
    """Whether a folder holds a config.yaml that RunFolder wrote."""
    try:
        with open(Path(path) / "config.yaml", encoding="utf-8", errors="replace") as stream:
            return stream.read(len(MARK)) == MARK
    except OSError:
        return False


def refuse_existing(output: str | Path) -> None:
    """Raise a RunFolderError where a folder that is not a run would be written over."""
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunFolderError(f"{output}: exists already; choose another --output")


class RunFolder:
    """An open run folder, locked for this process until `close` (it is a context manager)."""

    def __init__(self, path: Path, lock: IO[str] | None, resumed: bool):
        self.path = path
        self.resumed = resumed  # whether the folder held a run before
        self._lock = lock

    @staticmethod
    def check(
        path: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        config_yaml: str | None = None,
        may_differ: Collection[str] = (),
    ) -> None:
        """Raise the RunFolderError that `open` would raise for what is at the path; write nothing. For before the models are loaded."""
        if resume and overwrite:
            raise RunFolderError("--resume continues a run and --overwrite deletes it: choose one")
        _refuse(Path(path), resume, overwrite)
        if resume and config_yaml is not None and is_run(path):
            refuse_changes(Path(path), config_yaml, {*HARMLESS, *may_differ})

    @classmethod
    def open(
        cls, path: str | Path, config_yaml: str, *, resume: bool = False, overwrite: bool = False, may_differ: Collection[str] = ()
    ) -> RunFolder:
        """Make, continue or replace a run folder, lock it, and write config.yaml and environment.json.

        resume: go on with a run of the same configuration; an absent or empty folder is begun anew. HARMLESS keys may differ, and
        the keys and whole sections in may_differ.
        overwrite: delete the run that is there first.
        Raises RunFolderError: the folder holds something and neither is given; it holds something that is no run of ours;
        the configurations differ; another process is using it; it cannot be written.
        """
        path = Path(path)
        mine: list[RunFolder] = []

        def take() -> bool:
            mine.append(cls._open(path, config_yaml, resume, overwrite, may_differ))
            return mine[0].resumed

        resumed = world().once(take)  # by rank 0, which holds the lock and writes for all
        return mine[0] if mine else cls(path, None, resumed)

    @classmethod
    def _open(cls, path: Path, config_yaml: str, resume: bool, overwrite: bool, may_differ: Collection[str]) -> RunFolder:
        cls.check(path, resume=resume, overwrite=overwrite)
        fresh = not os.path.lexists(path)
        with write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        try:
            lock = _take_lock(path)
        except BaseException:
            if fresh:
                _unmake(path)
            raise
        run = cls(path, lock, False)
        try:
            _refuse(path, resume, overwrite)  # again: another process may have been quicker
            run.resumed = is_run(path) and not overwrite
            if run.resumed:
                refuse_links(path)
                refuse_changes(path, config_yaml, {*HARMLESS, *may_differ})
                run._tidy()
            else:
                _empty(path)
            _write_start(run, config_yaml, fresh)
        except BaseException:
            lock.close()
            raise
        return run

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """Open and lock a run folder as it is, to add to it. Raises RunFolderError where there is none."""
        path = Path(path)
        if not is_run(path):
            raise RunFolderError(f"{path}: not a run folder (no config.yaml of srppo in it)")
        run = cls(path, _take_lock(path), True)
        try:
            refuse_links(path)
            run._tidy()
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Release the lock. The lock file stays: removing it would let two processes lock two files of one name."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def write_json(self, name: str, content: Any) -> None:
        """Atomic; NaN and infinity become null."""
        write_json(self.path / name, content)

    def read_json(self, name: str) -> Any:
        return read_json(self.path / name)

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl: {"stage": …, "iteration" or "step": …, metric: number, …}."""
        append_lines(self.path / "metrics.jsonl", [record])

    def samples(self, iteration: int, rows: list[dict[str, Any]], stage: str = "ppo") -> None:
        """Add samples (prompt, completion, group, reward, …) to samples.jsonl under a stage and iteration."""
        append_lines(self.path / "samples.jsonl", [{"stage": stage, "iteration": iteration, **row} for row in rows])

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl so far."""
        return read_lines(self.path / "metrics.jsonl")

    def truncate_metrics(self, iteration: int, stage: str = "ppo") -> None:
        """Forget what a stage wrote to metrics.jsonl and samples.jsonl after an iteration (or step): a resumed run will write it again.

        Records of other stages stay. -1 forgets the whole stage.
        """
        for name in LOGS if world().main else ():
            if self.has(name):
                records = read_lines(self.path / name)
                kept = [r for r in records if r.get("stage") != stage or r.get("iteration", r.get("step", 0)) <= iteration]
                if len(kept) < len(records):
                    write_lines(self.path / name, kept)

    def environment(self) -> dict[str, Any]:
        """Versions and hardware of this process, as written to environment.json."""
        return environment()

    def _tidy(self) -> None:
        """Remove what a killed process left: unfinished files and folders, half a last line."""
        for pattern in (".", "stages", "evaluation", "critic", "plots", "sft_checkpoints", "checkpoints/*"):
            for folder in [self.path] if pattern == "." else list(self.path.glob(pattern)):
                remove_unfinished(folder)
        for handed in self.path.glob("vllm/srppo-*"):  # weights for vLLM's servers
            shutil.rmtree(handed, ignore_errors=True)
        for name in LOGS:
            repair_lines(self.path / name)


def _write_start(run: RunFolder, config_yaml: str, fresh: bool) -> None:
    """config.yaml and environment.json; of a new run both or neither."""
    note = f"{MARK}: its resolved configuration, srppo {version('srppo')}. It is a recipe too.\n"
    try:
        write_bytes(run.path / "config.yaml", (note + config_yaml).encode())
        run.write_json("environment.json", _with_history(run))
    except BaseException:
        if not run.resumed:
            for name in ("config.yaml", "environment.json"):
                (run.path / name).unlink(missing_ok=True)
            if fresh:
                _unmake(run.path)
        raise


def _unmake(path: Path) -> None:
    """Remove a folder that was made a moment ago, and holds no more than the lock."""
    with contextlib.suppress(OSError):
        (path / LOCK).unlink(missing_ok=True)
        path.rmdir()


def _with_history(run: RunFolder) -> dict[str, Any]:
    """This process's environment, and under before_resume the differing ones of the processes that began the run."""
    now = plain(run.environment())
    if not run.has("environment.json"):
        return now
    old = read_environment(run.path / "environment.json")
    before = old.pop("before_resume", None) or []
    if old != now:
        before = [*before, old]
    return {**now, "before_resume": before} if before else now


def _contents(path: Path) -> list[str]:
    """Names in a folder besides the lock; [] where there is none."""
    if not os.path.lexists(path):
        return []
    if not path.is_dir():
        raise RunFolderError(f"{path}: is a file (or a dead link), not a folder; choose another --output")
    try:
        return [name for name in os.listdir(path) if name != LOCK]
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from error


def _refuse(path: Path, resume: bool, overwrite: bool) -> None:
    if not _contents(path):
        return
    if not is_run(path):
        raise RunFolderError(f"{path}: is not empty and not a run folder of srppo, so nothing in it is touched; choose another --output")
    if not (resume or overwrite):
        raise RunFolderError(
            f"{path}: already holds a run; continue it with --resume, replace it with --overwrite, or choose another --output"
        )


def _take_lock(path: Path) -> IO[str]:
    """The kernel drops a flock when its process ends, so a crash leaves no stale lock behind."""
    with write_errors(path / LOCK):
        opened = open_here(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        lock = os.fdopen(opened, "a+", encoding="utf-8")  # held until the run closes
    if sys.platform == "win32":
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise RunFolderError(f"{path}: in use by another run (process {owner}); wait for it, or choose another --output") from None
        raise RunFolderError(f"{path}: cannot be locked: {error.strerror}; choose an --output on a local file system") from error
    try:
        with write_errors(path / LOCK):
            lock.truncate(0)
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())  # unbuffered: nothing is left to be written when it is closed
    except BaseException:
        lock.close()
        raise
    return lock


def _empty(path: Path) -> None:
    """Delete a run. config.yaml goes last: until then the folder is recognisably ours, and an interrupted deletion can be repeated."""
    for name in sorted(_contents(path), key=lambda n: n == "config.yaml"):
        entry = path / name
        with write_errors(entry):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
