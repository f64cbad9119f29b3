"""Checkpoints of which any file has been damaged: the one before is gone on from, or the error says in words what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srppo.errors import RunFolderError
from srppo.train.checkpoint import Checkpoint, load_checkpoint, load_latest, save_checkpoint
from tiny_fuzz import bounded, damaged, json_bytes, spoil


def checkpoint(step: int) -> Checkpoint:
    tensors = {"policy": {"a.weight": torch.arange(6.0).reshape(2, 3) + step, "b": torch.tensor([step])}, "policy-optimizer": {}}
    return Checkpoint(step, tensors, {"episodes": step, "beta": 0.5, "guard": None, "skips": [[0, 1]]})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "ppo"
    for step in (3, 4):
        save_checkpoint(folder, checkpoint(step), keep=2)
    return folder


def same(found: Checkpoint, step: int) -> bool:
    right = checkpoint(step)
    tensors = {g: dict(t) for g, t in found.tensors.items()}
    equal = all(torch.equal(tensors.get(g, {}).get(n, torch.empty(0)), t) for g, own in right.tensors.items() for n, t in own.items())
    return found.step == step and dict(found.state) == right.state and equal


@bounded(80)
@given(data=st.data())
def test_any_damage_to_the_last_one(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    path = data.draw(st.sampled_from(sorted(p for p in (folder / "checkpoint-4").iterdir())))
    content = path.read_bytes()
    accident = st.just("bytes") if path.suffix != ".json" else st.sampled_from(["bytes", "value"])
    match data.draw(st.one_of(accident, accident, st.sampled_from(["gone", "folder", "longer"]))):
        case "gone":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
        case "longer":
            path.write_bytes(content + b"\0")
        case "value":
            path.write_bytes(json_bytes(spoil(data, json.loads(content))))
        case _:
            path.write_bytes(data.draw(damaged(content)))
    said: list[str] = []
    try:
        found = load_latest(folder, warn=said.append)
    except RunFolderError as error:
        assert str(folder) in str(error)
        return
    assert found is not None
    assert same(found, 3) or same(found, 4), (path, said)
    if same(found, 3):
        assert any("checkpoint-4" in text for text in said) or path.name == "state.json"
    one: Any = None
    try:
        one = load_checkpoint(folder, 4)
    except RunFolderError as error:
        assert "checkpoint-4" in str(error)
    assert one is None or same(one, 4)


@bounded(20)
@given(data=st.data())
def test_both_damaged(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "both"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for step in (3, 4):
        path = folder / f"checkpoint-{step}/state.json"
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        found = load_latest(folder, warn=lambda text: None)
    except RunFolderError as error:
        assert str(folder) in str(error)
        return
    assert found is None or same(found, 3) or same(found, 4)
