"""How a checkpoint's tensors lie on disk: a storage of torch.distributed.checkpoint (DCP), in safetensors files with checksums.

DCP plans who writes which part of a sharded tensor, and who reads what of it in however many processes there are later; this is what
touches the disk. Its own writer of safetensors makes each file twice in memory before a byte is written, and knows no checksums; here a
tensor goes to the disk by itself, summed up on the way. No pickle in any file.

One file a group and process, `policy.safetensors`, or `policy-3.safetensors` of process 3 of several, which any reader of safetensors
opens. `index.json` says where each part of each tensor is.
"""

from __future__ import annotations

import json
import math
import os
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

T = TypeVar("T")
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP, where there is one process only
INDEX = "index.json"
PIECE = 1 << 22  # bytes summed up and written at once
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without gradient."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class Planner(DefaultSavePlanner):
    """DCP's, over flat names. copies: values to write in place of the tensors' own, by name (each this process's part)."""

    def __init__(self, copies: Mapping[str, Tensor] | None = None):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name = write_item.index.fqn
        return local(self.state_dict[name]) if self._copies is None else self._copies[name]


@dataclass(frozen=True)
class Written:
    """What a process tells of a part that it has written."""

    file: str
    bytes: int  # of the whole file
    crc32: int


class Writer(StorageWriter):
    """Writes into a folder that process 0 makes. `finished(files)` is called there when all have written, with {name: {bytes, crc32}}."""

    def __init__(self, folder: Path, finished: Callable[[dict[str, dict[str, int]]], None]):
        self._folder, self._finished = folder, finished

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:  # the others write after all have planned
            self._folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data="" if len(plans) == 1 else f"-{rank}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        groups: dict[str, list[WriteItem]] = {}
        for item in sorted(plan.items, key=lambda item: item.index.fqn):  # the same file whatever order the tensors came in
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
            if math.prod(item.tensor_data.chunk.sizes):
                groups.setdefault(item.index.fqn.split("/", 1)[0], []).append(item)
        results = []
        for group, items in groups.items():
            written = write_file(self._folder / f"{group}{plan.storage_data}.safetensors", items, planner)
            results += [WriteResult(item.index, 0, written) for item in items]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for rs in results for r in rs}
        index = {}
        for name, known in metadata.state_dict_metadata.items():
            assert isinstance(known, TensorStorageMetadata)
            parts = [
                {"file": where[name, tuple(chunk.offsets)].file, "offset": list(chunk.offsets), "shape": list(chunk.sizes)}
                for chunk in known.chunks
                if math.prod(chunk.sizes)
            ]
            index[name] = {"dtype": NAMES[known.properties.dtype], "shape": list(known.size), "parts": parts}
        files = {written.file: {"bytes": written.bytes, "crc32": written.crc32} for written in where.values()}
        files[INDEX] = write_summed(self._folder / INDEX, json.dumps(index).encode())
        self._finished(dict(sorted(files.items())))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Reader(StorageReader):
    """Reads parts of tensors out of a folder, as its index says."""

    def __init__(self, folder: Path, index: Index):
        self._folder, self._index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with ExitStack() as opened:
            files: dict[str, Any] = {}
            for item in plan.items:
                name, offset = item.storage_index.fqn, tuple(item.storage_index.offset or ())
                file = self._index.storage_data[name, offset]
                if file not in files:
                    files[file] = opened.enter_context(safe_open(self._folder / file, framework="pt"))
                key, parts = name.split("/", 1)[1], zip(item.storage_offsets, item.lengths)
                found = files[file].get_slice(key)[tuple(slice(a, a + n) for a, n in parts)] if offset else files[file].get_tensor(key)
                target = planner.resolve_tensor(item)
                target.detach().copy_(found)
                planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Index(Metadata):
    """What DCP knows of a checkpoint's tensors; storage_data is {(name, offset): file}."""

    def kinds(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Whole shape and precision of each tensor."""
        known = self.state_dict_metadata
        return {name: (k.size, k.properties.dtype) for name, k in known.items() if isinstance(k, TensorStorageMetadata)}


def read_index(folder: Path, files: Collection[str]) -> Index:
    """The index of a folder whose files are these. Raises OSError, ValueError, TypeError or KeyError for what is not one."""
    tensors: dict[str, Any] = {}
    where: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, known in json.loads((folder / INDEX).read_text(encoding="utf-8")).items():
        chunks = [ChunkStorageMetadata(torch.Size(p["offset"]), torch.Size(p["shape"])) for p in known["parts"]]
        tensors[name] = TensorStorageMetadata(TensorProperties(DTYPES[known["dtype"]]), torch.Size(known["shape"]), chunks)
        where |= {(name, tuple(p["offset"])): p["file"] for p in known["parts"]}
    if strange := set(where.values()) - set(files):
        raise ValueError(f"the index names {min(strange)!r}, which is no file of this checkpoint")
    return Index(tensors, storage_data=where)


def write_file(path: Path, items: list[WriteItem], planner: SavePlanner) -> Written:
    """One safetensors file, a tensor after the other, flushed to the disk. Names are those of the items without their group."""
    header: dict[str, Any] = {}
    end = 0
    for item in items:
        assert item.tensor_data is not None
        dtype, shape = item.tensor_data.properties.dtype, list(item.tensor_data.chunk.sizes)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        name = item.index.fqn.split("/", 1)[1]
        assert name not in header, f"{name}: two parts in one process"
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the data is aligned
    with open(path, "wb", buffering=0) as stream:
        summed = Summed(stream)
        summed.write(len(head).to_bytes(8, "little") + head)
        for item in items:
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor)
            summed.write(value.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(stream.fileno())
    return Written(path.name, summed.bytes, summed.crc32)


class Summed:
    """A file being written, with its size and checksum so far."""

    def __init__(self, stream: IO[bytes]):
        self._stream, self.bytes, self.crc32 = stream, 0, 0

    def write(self, content: bytes | memoryview) -> None:
        for start in range(0, len(content), PIECE):
            piece = memoryview(content)[start : start + PIECE]
            self.crc32 = zlib.crc32(piece, self.crc32)
            self.bytes += len(piece)
            while piece:  # the system may take less than it is given
                piece = piece[self._stream.write(piece) :]


def write_summed(path: Path, content: bytes) -> dict[str, int]:
    """Write and flush a small file, and return its size and checksum."""
    with open(path, "wb", buffering=0) as stream:
        summed = Summed(stream)
        summed.write(content)
        os.fsync(stream.fileno())
    return {"bytes": summed.bytes, "crc32": summed.crc32}


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
