"""Ctrl-C and SIGTERM at a real run, and at one of two processes: it saves, says how to go on, and ends later as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from srppo.config import dump
from tiny_job import tiny_job

PATIENCE = 240.0  # seconds for a part of a job that takes a few, on a busy machine
STEPS, ROUNDS = 200, 6  # steps of milliseconds: so many that a fast machine is not through before the signal


def align(recipe: Path, *flags: str, **place: object) -> subprocess.Popen[str]:
    """place: variables as torchrun sets them."""
    command = [sys.executable, "-m", "srppo", "align", str(recipe), "--progress", "plain", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in place.items()}}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def recorded(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The steps or rounds of a stage that metrics.jsonl holds by now."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    records = (json.loads(line) for line in lines if line.endswith("\n"))
    return [r for r in records if r["stage"] == stage and ("loss" in r or "iteration" in r)]


def interrupted(process: subprocess.Popen[str], folder: Path, stage: str, number: signal.Signals) -> str:
    """Send a signal as soon as the stage has a record, and return what the process says."""
    end = time.monotonic() + PATIENCE
    try:
        while not recorded(folder, stage):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, f"no record of {stage}"
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 128 + number, errors  # as a shell counts
    return errors


def finished(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors


def test_a_run_that_was_interrupted_twice_ends_as_one_that_was_not(tmp_path: Path) -> None:
    recipes = {}
    for name in ("cut", "whole"):
        training = {"sft__steps": STEPS, "sft__learning_rate": 1e-3, "ppo__iterations": ROUNDS}
        changes = {**training, "evaluation__continued_sft": False, "guard__keep": "last"}
        config = tiny_job(tmp_path, output=str(tmp_path / name), diagnose__on_no_go="warn", diagnose__samples=2, **changes)
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(dump(config), encoding="utf-8")
    cut, whole = tmp_path / "cut", tmp_path / "whole"

    said = interrupted(align(recipes["cut"]), cut, "sft", signal.SIGINT)
    assert "stopped after SFT step" in said and "--resume" in said and "Traceback" not in said
    assert 0 < len(recorded(cut, "sft")) < STEPS and not recorded(cut, "ppo")
    said = interrupted(align(recipes["cut"], "--resume"), cut, "ppo", signal.SIGTERM)  # a scheduler's pre-emption
    assert "--resume" in said and "Traceback" not in said
    assert 0 < len(recorded(cut, "ppo")) < ROUNDS and not (cut / "summary.json").exists()

    finished(align(recipes["cut"], "--resume"))
    finished(align(recipes["whole"]))
    weights = "policy/model.safetensors"
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()
    for stage, keys, count in (("sft", ("step", "loss"), STEPS), ("ppo", ("iteration", "objective/scores", "objective/kl"), ROUNDS)):
        runs = [[[r[k] for k in keys] for r in recorded(folder, stage)] for folder in (cut, whole)]
        assert len(runs[1]) == count and runs[0] == runs[1]


def on_two_machines(recipe: Path, *flags: str) -> list[subprocess.Popen[str]]:
    """Two processes as if each were on a machine of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [align(recipe, *flags, RANK=rank, **where) for rank in range(2)]


def test_sigterm_at_one_of_two_processes_saves_and_ends_both(tmp_path: Path) -> None:
    recipes = {}
    for name in ("cut", "whole"):
        training = {"ppo__iterations": ROUNDS, "evaluation__continued_sft": False, "guard__keep": "last", "diagnose__enabled": False}
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(dump(tiny_job(tmp_path, output=str(tmp_path / name), **training)), encoding="utf-8")
    cut, whole = tmp_path / "cut", tmp_path / "whole"

    first, second = on_two_machines(recipes["cut"])
    try:
        said = interrupted(second, cut, "ppo", signal.SIGTERM)
        _, errors = first.communicate(timeout=PATIENCE)
    finally:
        first.kill()
    assert first.returncode == 143 and "--resume" in errors and "Traceback" not in errors + said
    assert 0 < len(recorded(cut, "ppo")) < ROUNDS and not (cut / "summary.json").exists()

    for name, flags in (("cut", ["--resume"]), ("whole", [])):
        for process in on_two_machines(recipes[name], *flags):
            finished(process)
    weights = "policy/model.safetensors"
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()
