"""Disks that are full or read-only under the run folder and the report, and clocks that are set back. Real file systems where the
machine lets a test mount one."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import srppo
from srppo.cli import after_interrupt
from srppo.config import build, dump
from srppo.profiling.ledger import Ledger
from srppo.run_folder import RunFolder
from tiny_report import write_run

SOURCE = Path(srppo.__file__).parent


def mounted(tmp_path: Path, size: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that finds a file system of so many bytes at `place`, in a mount namespace of its own. Skips where none is allowed."""
    place = tmp_path / "mount"
    place.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    mount = f"mount -t tmpfs -o size={size} none {place}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets no test mount a file system")
    head = f"import subprocess\nfrom pathlib import Path\nplace, tmp = Path({str(place)!r}), Path({str(tmp_path)!r})\n"
    code = tmp_path / "program.py"
    code.write_text(head + textwrap.dedent(program))
    command = f"{mount} && exec {sys.executable} {code} {place}"
    return subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, timeout=120)


def test_a_report_on_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    write_run(tmp_path / "run", answers=False, iterations=3)
    program = """
        import shutil
        from srppo.errors import RunFolderError
        from srppo.report import write_report

        run = Path(shutil.copytree(tmp / "run", place / "run"))
        (run / "report.html").write_text("old")
        (place / "filler").write_bytes(b"x" * (place / "run").stat().st_size)
        filler = open(place / "filler", "ab", buffering=0)
        try:
            while True:
                filler.write(b"x" * 512)
        except OSError:
            pass
        before = {str(p) for p in run.rglob("*") if p.is_file()}
        try:
            write_report(run)
        except RunFolderError as error:
            print("said:", error)
        assert (run / "report.html").read_text() == "old"
        print("new files:", {str(p) for p in run.rglob("*") if p.is_file()} - before)
    """
    done = mounted(tmp_path, "512k", program)
    assert "no space is left on the device" in done.stdout and "new files: set()" in done.stdout, done.stdout + done.stderr


def test_a_run_folder_on_a_full_disk(tmp_path: Path) -> None:
    program = """
        from srppo.config import build, dump
        from srppo.errors import RunFolderError
        from srppo.run_folder import RunFolder

        try:
            with RunFolder.open(place / "run", dump(build({}))) as run:
                for i in range(100_000):
                    run.log({"stage": "sft", "step": i, "loss": 1.0, "text": "x" * 100})
        except RunFolderError as error:
            print("said:", error)
        import json
        lines = (place / "run/metrics.jsonl").read_text().splitlines()
        print("whole:", [json.loads(line)["step"] for line in lines] == list(range(len(lines))), len(lines) > 10)
        try:
            RunFolder.open(place / "other", dump(build({})))
        except RunFolderError as error:
            print("said:", error)
        print("left:", sorted(p.name for p in place.iterdir()))
    """
    done = mounted(tmp_path, "64k", program)
    assert done.stdout.count("no space is left on the device") == 2, done.stdout + done.stderr
    assert "whole: True True" in done.stdout and "left: ['run']" in done.stdout, done.stdout


def test_a_read_only_disk(tmp_path: Path) -> None:
    write_run(tmp_path / "run", answers=False, iterations=3)
    program = """
        import shutil
        from srppo.config import build, dump
        from srppo.errors import RunFolderError
        from srppo.report import write_report
        from srppo.report.record import read_run
        from srppo.run_folder import RunFolder

        run = Path(shutil.copytree(tmp / "run", place / "run"))
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        for use in (
            lambda: write_report(run),
            lambda: RunFolder.existing(run),
            lambda: RunFolder.open(run, dump(build({})), overwrite=True),
            lambda: RunFolder.open(place / "new", dump(build({}))),
        ):
            try:
                use()
            except RunFolderError as error:
                print("said:", error)
        print("read:", bool(read_run(run).metrics))
    """
    done = mounted(tmp_path, "2m", program)
    assert done.stdout.count("the file system is read-only; choose another --output") == 4, done.stdout + done.stderr
    assert "read: True" in done.stdout


# --- clocks


def test_nothing_depends_on_the_date() -> None:
    """Durations and orders come from the monotonic clock, counters and names: the date may be set back while a run goes on."""
    dated = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "today"), ("datetime", "utcnow"), ("date", "today")}
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if named and ((node.value.id, node.attr) in dated or node.attr in ("st_mtime", "st_ctime")):  # type: ignore[attr-defined]
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
            if isinstance(node, ast.Attribute) and node.attr in ("st_mtime", "st_ctime", "st_mtime_ns"):
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert not found


def test_a_clock_set_back_costs_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([2e9, 1e9, 5e8, 1.0, 0.0] * 100)
    monkeypatch.setattr(time, "time", lambda: next(now))
    ledger = Ledger()
    with ledger.stage("sft"):
        pass
    assert 0 <= ledger.stages["sft"]["seconds"] < 60


def test_the_newest_checkpoint_is_the_one_of_the_latest_step(tmp_path: Path) -> None:
    """Whatever the dates of the folders: a copied run has those of the copying."""
    with RunFolder.open(tmp_path / "run", dump(build({}))):
        pass
    for stage, step in (("sft", 50), ("ppo", 9), ("ppo", 10), ("guard-best", 8), ("stopped", 11)):
        folder = tmp_path / f"run/checkpoints/{stage}/checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({}))
    assert "ppo/checkpoint-10 is kept" in after_interrupt(str(tmp_path / "run"))
