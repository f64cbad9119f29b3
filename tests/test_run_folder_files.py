"""A run folder's files: written whole or not at all, cut back, and read."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srppo import files
from srppo.config import build, dump
from srppo.errors import RunFolderError
from srppo.files import append_lines, plain, read_lines, write_bytes, write_json
from srppo.run_folder import RunFolder

CONFIG = dump(build({}))


# --- writing


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "no space is left on the device"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "Input/output"),
    ],
)
@pytest.mark.parametrize("step", ["mkstemp", "fsync", "replace"])
def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str, step: str) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile if step == "mkstemp" else os, step, fail)
    with pytest.raises(RunFolderError, match=advice) as error:
        write_json(tmp_path / "a.json", {"new": 2})
    monkeypatch.undo()
    assert str(tmp_path / "a.json") in str(error.value)
    assert {p.name: json.loads(p.read_text()) for p in tmp_path.iterdir()} == {"a.json": {"old": 1}}


def test_interrupt_while_writing_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_run_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([None, OSError(errno.ENOSPC, "full")])  # config.yaml succeeds, environment.json does not

    def sometimes(*_: Any) -> None:
        if (error := next(calls)) is not None:
            raise error

    monkeypatch.setattr(os, "fsync", sometimes)
    with pytest.raises(RunFolderError, match="no space"):
        RunFolder.open(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


def test_full_disk_while_appending_leaves_whole_lines(tmp_path: Path) -> None:
    """A real partial write: the process may write 4096 bytes a file, so the kernel takes a part of a line and refuses the rest."""
    code = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        from srppo.errors import RunFolderError
        from srppo.files import append_lines
        try:
            for i in range(1000):
                append_lines({str(tmp_path / "m.jsonl")!r}, [{{"iteration": i, "text": "x" * 37}}])
        except RunFolderError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "cannot write" in done.stdout and "m.jsonl" in done.stdout, done.stderr
    raw = (tmp_path / "m.jsonl").read_bytes()
    assert raw.endswith(b"}\n")
    assert [json.loads(line)["iteration"] for line in raw.splitlines()] == list(range(len(raw.splitlines())))
    assert 4096 - len(raw) < 2 * 60


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_json_holds_no_nan_and_unpacks_tensors(tmp_path: Path) -> None:
    value = {
        "nan": float("nan"),
        "inf": -float("inf"),
        "tensor": torch.tensor([[1.5, float("inf")]]),
        "scalar": torch.tensor(3),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "numpy": np.float32(0.25),
        "integer": np.int64(7),
        "flag": np.bool_(True),
        "tuple": (1, None, True),
        "path": Path("a/b"),
        5: "é\ud800",
    }
    expected = {
        "nan": None,
        "inf": None,
        "tensor": [[1.5, None]],
        "scalar": 3,
        "half": 0.5,
        "numpy": 0.25,
        "integer": 7,
        "flag": True,
        "tuple": [1, None, True],
        "path": "a/b",
        "5": "é?",
    }
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == expected
    assert type(plain(np.float64(1.0))) is float


# --- metrics and samples


def test_truncation_forgets_a_stage_after_an_iteration(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        for step in range(1, 4):
            run.log({"stage": "sft", "step": step})
        for k in range(1, 6):
            run.log({"stage": "ppo", "iteration": k})
            run.samples(k, [{"prompt": "a", "response": f"{k}"}, {"prompt": "b", "response": f"{k}"}])
        run.truncate_metrics(3)
        run.truncate_metrics(2, "sft")
        assert [(r["stage"], r.get("iteration", r.get("step"))) for r in run.metrics()] == [
            ("sft", 1),
            ("sft", 2),
            ("ppo", 1),
            ("ppo", 2),
            ("ppo", 3),
        ]
        samples = read_lines(run.path / "samples.jsonl")
        assert [s["iteration"] for s in samples] == [1, 1, 2, 2, 3, 3]
        assert samples[0] == {"stage": "ppo", "iteration": 1, "prompt": "a", "response": "1"}
        run.truncate_metrics(-1)
        assert {r["stage"] for r in run.metrics()} == {"sft"} and not read_lines(run.path / "samples.jsonl")


def test_truncation_that_changes_nothing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        run.log({"stage": "ppo", "iteration": 1})
        monkeypatch.setattr(files, "write_bytes", lambda *_: pytest.fail("rewritten"))
        run.truncate_metrics(1)


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    append_lines(path, [{"a": 1}])
    path.write_bytes(path.read_bytes() + b'{"a": 2\n{"a": 3}\n')
    with pytest.raises(RunFolderError, match=r"m\.jsonl, line 2: damaged"):
        read_lines(path)


def test_missing_and_damaged_json(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        with pytest.raises(RunFolderError, match=r"summary\.json: no such file; the run did not get so far"):
            run.read_json("summary.json")
        (run.path / "summary.json").write_text("{")
        with pytest.raises(RunFolderError, match=r"summary\.json: cannot be read"):
            run.read_json("summary.json")
