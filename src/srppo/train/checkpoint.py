"""Checkpoints of a training in progress: folders that appear whole or not at all, whose damage is noticed, and that any number of
processes can read.

`checkpoint-<step>/` holds safetensors files (checkpoint_storage.py) and, written last, `state.json`: counters and such, and size and
checksum of every file (checkpoint_state.py). With several processes all of them call these functions; each writes its own parts of the
tensors, process 0 the rest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from srppo.errors import RunFolderError, SrppoError
from srppo.files import sync_file, sync_folder
from srppo.models.roles import Roles
from srppo.run_folder import LOGS
from srppo.train.checkpoint_state import (
    STATE,
    DamagedCheckpoint,
    checkpoint_path,
    damage,
    drop,
    drop_old,
    is_whole,
    named_steps,
    read_state,
    saved_steps,
    state_text,
    sweep,
)
from srppo.world import World, world

__all__ = ["Checkpoint", "checkpoint_path", "drop", "load_checkpoint", "load_latest", "load_own", "save_checkpoint", "saved_steps"]

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """step (optimizer step or iteration) finished, named groups of tensors, and JSON-able state.

    tensors: e.g. {"policy": ..., "policy-optimizer": ...}, plain ones that all processes have alike, or DTensors. To save, they may be
    those that are trained themselves: a tensor is copied when it is written, one after the other.
    """

    step: int
    tensors: Tensors
    state: Mapping[str, Any]


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    keep: int,
    *,
    copies: Mapping[str, Tensor] | None = None,
    here: World | None = None,
) -> Path:
    """Write `folder/checkpoint-<step>` under a temporary name, flush, rename, then drop all but the last `keep`, this one included.

    A whole checkpoint of that step that is already there is the same state, and stays. copies: by group/name, what to write in place of
    this process's parts of the tensors. here: the processes, by default those of the run.
    Raises RunFolderError when the disk is full or not writable; earlier checkpoints stay as they were.
    """
    from torch.distributed.checkpoint import save  # slow to import, and needed only here
    from torch.distributed.checkpoint.api import CheckpointException

    from srppo.train.checkpoint_storage import Planner, Writer, write_summed

    final, here = checkpoint_path(folder, checkpoint.step), here or world()
    temporary = folder / f".{final.name}.partial"
    content = {"step": checkpoint.step, "groups": sorted(checkpoint.tensors), "world_size": here.size, "state": dict(checkpoint.state)}

    def needed() -> bool:
        if is_whole(final):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        run = folder.parent.parent
        for records in (run / name for name in LOGS):  # a resumed run does not write them again
            if records.is_file():
                sync_file(records)
        for parent in (folder.parent, run):
            sync_folder(parent)
        sweep(folder)
        return True

    def finished(files: dict[str, dict[str, int]]) -> None:
        write_summed(temporary / STATE, state_text(content | {"files": files}))
        sync_folder(temporary)
        drop(final)  # a damaged one
        os.replace(temporary, final)
        sync_folder(folder)
        drop_old(folder, checkpoint.step, keep)

    try:
        if here.once(needed):
            save(flat(checkpoint.tensors), storage_writer=Writer(temporary, finished), planner=Planner(copies), **_options(here))
    except (CheckpointException, OSError) as error:
        if here.main:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = _cause(error)
        if not isinstance(cause, OSError):
            raise cause from error
        raise RunFolderError(
            f"{final}: the checkpoint could not be written ({cause}); earlier checkpoints are intact. "
            "Free space, then continue with --resume"
        ) from error
    return final


def load_checkpoint(folder: Path, step: int, like: Tensors | None = None) -> Checkpoint:
    """Read one checkpoint, its checksums first. Its tensors are new, whole and on the CPU; or, where `like` has a DTensor of their name,
    spread over the processes as that is. All have the precision they were saved in.

    Raises DamagedCheckpoint, and RunFolderError where it is of another version of srppo or does not fit `like`.
    """
    from torch.distributed.checkpoint import DefaultLoadPlanner, load  # slow to import, and needed only here
    from torch.distributed.checkpoint.api import CheckpointException

    from srppo.train.checkpoint_storage import Reader, read_index

    path, here = checkpoint_path(folder, step), world()
    content = here.once(lambda: read_state(path))
    share = list(content["files"].items())[here.rank :: here.size]  # each process sums up some of the files
    for reason in here.gather(damage(path, dict(share))):
        if reason:
            raise DamagedCheckpoint(path, reason)
    unreadable: str | None = None
    try:
        index = read_index(path, list(content["files"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        unreadable = f"{type(error).__name__}: {error}"
    for reason in here.gather(unreadable):  # before they read together
        if reason:
            raise DamagedCheckpoint(path, reason)
    try:
        known = {} if like is None else flat(like)
        found = {name: _memory(path, name, *kind, known.get(name)) for name, kind in index.kinds().items()}
        if found:
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            load(found, storage_reader=Reader(path, index), planner=planner, **_options(here))
    except (CheckpointException, OSError, ValueError, KeyError, TypeError) as error:
        cause = _cause(error)
        if not isinstance(cause, Exception):  # Ctrl-C
            raise cause from error
        raise DamagedCheckpoint(path, f"{type(cause).__name__}: {cause}") from error
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in content["groups"]}
    for name, tensor in found.items():
        group, own = name.split("/", 1)
        tensors[group][own] = tensor
    return Checkpoint(content["step"], tensors, content["state"])


def load_latest(folder: Path, like: Tensors | None = None, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The last whole checkpoint, or None where there is none. `warn` is told of later ones, which are damaged.

    Raises RunFolderError where there are some and none is whole, or the last is of another version of srppo.
    """
    damaged: list[DamagedCheckpoint] = []
    for step in reversed(world().once(lambda: named_steps(folder))):
        try:
            found = load_checkpoint(folder, step, like)
        except DamagedCheckpoint as error:
            damaged.append(error)
            continue
        for worse in damaged:
            warn(f"{worse.path}: damaged ({worse.reason}); going on from {checkpoint_path(folder, step).name}, the last whole one")
        return found
    if not damaged:
        return None
    told = "; ".join(f"{error.path.name}: {error.reason}" for error in damaged)
    raise RunFolderError(
        f"{folder}: no checkpoint is whole ({told}). Put one back, or delete this folder: --resume then begins this stage anew, "
        "and keeps the finished ones"
    )


def load_own(roles: Roles, role: str, folder: str | Path) -> None:
    """Load a model that this run has trained and saved. Raises RunFolderError where it is gone or damaged."""
    try:
        roles.load(role, folder)
    except (SrppoError, OSError) as error:
        what = f"is damaged ({error})" if Path(folder).is_dir() else "is gone"
        raise RunFolderError(f"{folder}: this run's own checkpoint {what}; put it back, or begin anew with --overwrite") from error


def _options(here: World) -> dict[str, Any]:
    """What DCP is to be told of the processes."""
    return {"no_dist": True} if here.alone else {"process_group": here.group}


def flat(tensors: Tensors) -> dict[str, Tensor]:
    """{group/name: tensor}."""
    return {f"{group}/{name}": tensor for group, own in tensors.items() for name, tensor in own.items()}


def _memory(path: Path, name: str, shape: torch.Size, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """For a tensor to be read."""
    if like is not None and like.shape != shape:
        raise RunFolderError(f"{path}: {name} is {list(shape)} there and {list(like.shape)} here: the checkpoint is of another model")
    if not isinstance(like, DTensor):
        return torch.empty(shape, dtype=dtype)
    return torch.empty_like(like, dtype=dtype, requires_grad=False)


def _cause(error: BaseException) -> BaseException:
    """What DCP has wrapped: a failure of one process, Ctrl-C before others."""
    failures = getattr(error, "failures", None)
    if not failures:
        return error
    kinds = [failures[rank][0] for rank in sorted(failures)]
    return next((kind for kind in kinds if not isinstance(kind, Exception)), kinds[0])
