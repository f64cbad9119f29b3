"""Checkpoints appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srppo.errors import RunFolderError
from srppo.train import checkpoint as module
from srppo.train.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, save_checkpoint, saved_steps


def content(step: int) -> Checkpoint:
    return Checkpoint(step, {"policy": {"w": torch.full((3,), float(step))}, "optimizer": {"w/step": torch.tensor(step)}}, {"beta": 0.5})


def test_round_trip_and_the_last_k_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, content(step), keep=2)
    assert saved_steps(tmp_path) == [2, 10]
    back = load_checkpoint(tmp_path, 10)
    assert back.step == 10 and back.state["beta"] == 0.5
    assert torch.equal(back.tensors["policy"]["w"], torch.full((3,), 10.0)) and int(back.tensors["optimizer"]["w/step"]) == 10


def test_a_failed_write_leaves_the_earlier_ones_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, content(1), keep=2)

    def full(tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(RunFolderError, match="earlier checkpoints are intact"):
        save_checkpoint(tmp_path, content(2), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert load_checkpoint(tmp_path, 1).step == 1


def test_a_partial_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.partial").mkdir()
    (tmp_path / "checkpoint-4").mkdir()  # killed while an older version of it was being deleted
    assert saved_steps(tmp_path) == []
    save_checkpoint(tmp_path, content(3), keep=1)
    save_checkpoint(tmp_path, content(4), keep=1)
    assert saved_steps(tmp_path) == [4]


def test_damage_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, content(5), keep=1)
    (checkpoint_path(tmp_path, 5) / "policy.safetensors").write_bytes(b"\0" * 10)
    with pytest.raises(RunFolderError, match="checkpoint-5: damaged"):
        load_checkpoint(tmp_path, 5)
