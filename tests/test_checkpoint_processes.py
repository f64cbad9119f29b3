"""Checkpoints that several processes write and read together: every part once, and another number of processes may go on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from checkpoint_worker import check, whole
from srppo.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def together(size: int, folder: Path, *tasks: str) -> None:
    """Run tasks (`task` or `task:folder`) in so many processes, and see that each ends well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    command = [sys.executable, "-W", "ignore", str(WORKER), str(folder), *tasks]
    environments = [{**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=e) for e in environments]
    try:
        for process in processes:
            said, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert json.loads(said.splitlines()[-1])["done"] == list(tasks)
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written."""
    folder = tmp_path_factory.mktemp("two")
    save_checkpoint(folder / "alone", Checkpoint(1, whole(1), {"beta": 1 / 7}), keep=2)
    save_checkpoint(folder / "alone", Checkpoint(2, whole(2), {"beta": 2 / 7}), keep=2)
    for step in (1, 2):
        save_checkpoint(folder / "damaged", Checkpoint(step, whole(step), {"beta": step / 7}), keep=2)
    file = folder / "damaged" / "checkpoint-2" / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    together(2, folder, "save", "load:alone", "full", "background", "damaged")
    return folder


def test_one_process_reads_what_two_wrote(two: Path) -> None:
    for step in (1, 2):
        check(load_checkpoint(two / "save", step), step, split=False)
    assert sorted(p.name for p in (two / "save").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_each_part_is_written_once(two: Path) -> None:
    path = two / "save" / "checkpoint-2"
    state = json.loads((path / "state.json").read_text())
    assert state["world_size"] == 2
    elements = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            elements += sum(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118  it is no dict
    assert elements == sum(t.numel() for own in whole(2).values() for t in own.values())
    assert {p.name for p in path.glob("policy*")} == {"policy-0.safetensors", "policy-1.safetensors"}


def test_another_number_of_processes_goes_on(two: Path, tmp_path: Path) -> None:
    (tmp_path / "save").symlink_to(two / "save")
    together(4, tmp_path, "load:save", "hybrid")
    check(load_checkpoint(tmp_path / "hybrid", 2), 2, split=False)
