"""One of several processes that save and load checkpoints together: `checkpoint_worker.py FOLDER TASK`, with torchrun's variables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from srppo.errors import RunFolderError
from srppo.meeting import start_world
from srppo.train import checkpoint_storage as storage
from srppo.train.checkpoint import Checkpoint, load_checkpoint, load_latest, save_checkpoint, saved_steps
from srppo.train.saver import Saver


def whole(step: int) -> dict[str, dict[str, Tensor]]:
    """What the processes hold together. Some have fewer rows than there are processes, one has none."""
    flat = torch.arange(40.0)
    return {
        "policy": {
            "even": flat.reshape(8, 5) + step,
            "odd": (flat[:35].reshape(7, 5) * step).bfloat16(),
            "one row": flat[:5].reshape(1, 5) - step,
            "none": torch.zeros(0, 3),
            "norm.weight": flat[:3] * 2 + step,
        },
        "optimizer": {"even/exp_avg": flat.reshape(8, 5) * 3, "even/step": torch.tensor(float(step))},
        "adapter": {"lora_A": flat[:6].reshape(2, 3) + step},  # alike in all processes
        "nothing": {},
    }


def parts(step: int, mesh: dist.device_mesh.DeviceMesh) -> dict[str, dict[str, Tensor]]:
    """`whole`, dealt to the processes: split by rows, over the last dimension of the mesh."""
    placement = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]

    def deal(group: str, tensor: Tensor) -> Tensor:
        return tensor if group == "adapter" or tensor.ndim == 0 else distribute_tensor(tensor, mesh, placement)

    return {group: {name: deal(group, tensor) for name, tensor in own.items()} for group, own in whole(step).items()}


def check(found: Checkpoint, step: int, split: bool) -> None:
    assert found.step == step and found.state == {"beta": step / 7}
    for group, own in whole(step).items():
        assert set(found.tensors[group]) == set(own)
        for name, tensor in own.items():
            back = found.tensors[group][name]
            assert isinstance(back, DTensor) == (split and group != "adapter" and tensor.ndim > 0)
            back = back.full_tensor() if isinstance(back, DTensor) else back
            assert back.dtype == tensor.dtype and torch.equal(back, tensor), name


def mesh_of(shards: int) -> dist.device_mesh.DeviceMesh:
    size = dist.get_world_size()
    if shards == size:
        return init_device_mesh("cpu", (size,))
    return init_device_mesh("cpu", (size // shards, shards), mesh_dim_names=("copies", "shards"))


def save(folder: Path, shards: int = 0) -> None:
    mesh = mesh_of(shards or dist.get_world_size())
    for step in (1, 2):
        save_checkpoint(folder, Checkpoint(step, parts(step, mesh), {"beta": step / 7}), keep=2)
        save_checkpoint(folder, Checkpoint(step, parts(step, mesh), {"beta": step / 7}), keep=2)  # is there already
    check(load_checkpoint(folder, 2, parts(0, mesh)), 2, split=True)


def load(folder: Path) -> None:
    mesh = mesh_of(dist.get_world_size())
    check(load_checkpoint(folder, 2, parts(0, mesh)), 2, split=True)
    check(load_checkpoint(folder, 1), 1, split=False)


def damaged(folder: Path) -> None:
    """Whoever finds the damage, all know."""
    told: list[str] = []
    found = load_latest(folder, warn=told.append)
    assert found is not None
    check(found, 1, split=False)
    assert len(told) == 1 and "checkpoint-2" in told[0], told


def full(folder: Path) -> None:
    """The disk of one process only is full: the write fails for all, and the checkpoint before stays."""
    mesh, write = mesh_of(dist.get_world_size()), storage.Summed.write
    save_checkpoint(folder, Checkpoint(1, parts(1, mesh), {"beta": 1 / 7}), keep=1)
    if dist.get_rank() == 1:

        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        storage.Summed.write = refuse  # type: ignore[method-assign, assignment]
    try:
        save_checkpoint(folder, Checkpoint(2, parts(2, mesh), {"beta": 2 / 7}), keep=1)
    except RunFolderError as error:
        assert "No space left" in str(error) and "--resume" in str(error)
    else:
        raise AssertionError("it should have failed")
    storage.Summed.write = write  # type: ignore[method-assign]
    dist.barrier()
    assert saved_steps(folder) == [1] and [p.name for p in folder.iterdir()] == ["checkpoint-1"]
    check(load_checkpoint(folder, 1), 1, split=False)


def background(folder: Path) -> None:
    """While a thread writes, the processes go on talking to each other."""
    mesh = mesh_of(dist.get_world_size())
    with Saver(folder, keep=1, background=True) as saver:
        for step in (1, 2, 3):
            saver.save(Checkpoint(step, parts(step, mesh), {"beta": step / 7}))
            for _ in range(20):
                saver.check()
                total = torch.ones(3)
                dist.all_reduce(total)
                assert total.tolist() == [dist.get_world_size()] * 3
    assert saved_steps(folder) == [3]
    check(load_checkpoint(folder, 3, parts(0, mesh)), 3, split=True)


TASKS: dict[str, Callable[[Path], None]] = {
    "save": save,
    "hybrid": lambda folder: save(folder, shards=2),
    "load": load,
    "damaged": damaged,
    "full": full,
    "background": background,
}

if __name__ == "__main__":
    place, *tasks = sys.argv[1:]
    here = start_world()
    for task in tasks:
        name, _, folder = task.partition(":")
        TASKS[name](Path(place) / (folder or name))
    here.barrier()
    print(json.dumps({"done": tasks}))
