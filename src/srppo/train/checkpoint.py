"""Checkpoints of a training in progress: safetensors and JSON in a folder that appears whole or not at all. No pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from srppo.errors import RunFolderError, SrppoError
from srppo.models.roles import Roles


@dataclass(frozen=True)
class Checkpoint:
    """step (optimizer step or iteration) finished, named groups of tensors, and JSON-able state."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # e.g. {"policy": ..., "policy-optimizer": ...}
    state: Mapping[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def saved_steps(folder: Path) -> list[int]:
    """Steps with a whole checkpoint, ascending."""
    found = (p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*") if (p / "state.json").is_file())
    return sorted(int(s) for s in found if s.isdigit())


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/checkpoint-<step>` under a temporary name, flush, rename, then drop all but the last `keep`.

    A checkpoint of that step that is already there is the same state, and stays.
    Raises RunFolderError when the disk is full or not writable; earlier checkpoints stay as they were.
    """
    final = checkpoint_path(folder, checkpoint.step)
    temporary = folder / f".{final.name}.partial"
    if checkpoint.step in saved_steps(folder):
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, tensors in checkpoint.tensors.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
        content = {"step": checkpoint.step, "groups": sorted(checkpoint.tensors), **checkpoint.state}
        (temporary / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        shutil.rmtree(final, ignore_errors=True)  # a folder without state.json: left by a process killed while deleting it
        temporary.rename(final)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or "No space" in str(error):  # safetensors wraps the system's error in its own type
            raise RunFolderError(
                f"{final}: the checkpoint could not be written ({error}); earlier checkpoints are intact. "
                "Free space, then continue with --resume"
            ) from error
        raise
    for step in saved_steps(folder)[:-keep]:
        shutil.rmtree(checkpoint_path(folder, step))
    return final


def load_own(roles: Roles, role: str, folder: str | Path) -> None:
    """Load a model that this run has trained and saved. Raises RunFolderError where it is gone or damaged."""
    try:
        roles.load(role, folder)
    except (SrppoError, OSError) as error:
        what = f"is damaged ({error})" if Path(folder).is_dir() else "is gone"
        raise RunFolderError(f"{folder}: this run's own checkpoint {what}; put it back, or begin anew with --overwrite") from error


def load_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Read one checkpoint. Raises RunFolderError when it is damaged."""
    path = checkpoint_path(folder, step)
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = {name: load_file(path / f"{name}.safetensors") for name in state["groups"]}
    except Exception as error:
        raise RunFolderError(f"{path}: damaged checkpoint ({error}); delete this folder to continue from the one before it") from error
    return Checkpoint(state["step"], tensors, state)
