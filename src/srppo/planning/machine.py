"""The machine a run is planned for: memory, matrix-product rate, memory bandwidth. Measured here in a second, or taken from a table."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from srppo.environment import hardware
from srppo.errors import ConfigError
from srppo.planning.processes import GLOO, Links, links_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Machine:
    """Rates are attained ones, not peaks. memory: of the device that computes; host_memory: of the CPU beside a GPU (None: unknown).

    count: GPUs in all, each with a process of its own, on so many machines alike; on a CPU: processes, among which its memory is divided.
    """

    name: str
    gpu: bool
    memory: int  # bytes
    host_memory: int | None
    flops: float  # matrix products in the run's precision, operations a second
    bandwidth: float  # bytes a second
    kernel: float  # seconds that a kernel takes at least, with the Python that starts it
    libraries: int  # bytes that the process holds before any model: on a CPU measured, on a GPU assumed
    measured: bool
    count: int = 1
    nodes: int = 1
    links: Links = GLOO

    @property
    def local(self) -> int:
        """GPUs, or processes, of one machine."""
        return self.count // self.nodes

    def seconds(self, flops: float, moved: float) -> float:
        """Of one kernel, by the roofline (Williams et al. 2009, doi 10.1145/1498765.1498785): arithmetic or memory, whichever is slower."""
        return max(flops / self.flops, moved / self.bandwidth, self.kernel)


# Vendors' figures: bfloat16 tensor cores without sparsity, float32 (without TF32, torch's default), GB/s, GB.
GPUS: dict[str, tuple[float, float, float, float]] = {
    "b200": (2250e12, 75e12, 8000e9, 180e9),
    "h200": (989e12, 67e12, 4800e9, 141e9),
    "h100": (989e12, 67e12, 3350e9, 80e9),
    "a100": (312e12, 19.5e12, 2039e9, 80e9),
    "a100-40gb": (312e12, 19.5e12, 1555e9, 40e9),
    "l40s": (362e12, 91.6e12, 864e9, 48e9),
    "a10g": (70e12, 35e12, 600e9, 24e9),
    "l4": (121e12, 30.3e12, 300e9, 24e9),
    "t4": (65e12, 8.1e12, 320e9, 16e9),
    "rtx5090": (210e12, 105e12, 1792e9, 32e9),
    "rtx4090": (165e12, 82.6e12, 1008e9, 24e9),
    "rtx3090": (71e12, 35.6e12, 936e9, 24e9),
}
ATTAINED, ATTAINED_BANDWIDTH = 0.5, 0.7  # shares of a table's peaks that are assumed; a measurement replaces them
GPU_KERNEL = 10e-6
PYTHON = 5  # a kernel inside a model, with the modules around it, over the smallest kernel alone
CUDA_CONTEXT = int(1.0e9)  # context, cuBLAS workspaces and what the allocator cannot use, assumed


def find_machine(
    device: str,
    dtype: str,
    *,
    gpu: str | None = None,
    gpus: int = 1,
    nodes: int = 1,
    gpu_memory: str | None = None,
    network: float | None = None,
) -> Machine:
    """gpu: a name of GPUS; else what is here, measured. gpus: of each of `nodes` machines. gpu_memory: such as 80GB, over what the card
    has. network: Gbit/s of a machine, over the table's. On a CPU (device: cpu) gpus are processes. Raises ConfigError."""
    if gpus < 1 or nodes < 1:
        raise ConfigError(f"--gpus {gpus} --nodes {nodes}: at least one of each")
    if network is not None and network <= 0:
        raise ConfigError(f"--network {network:g}: Gbit/s of a machine, above 0")
    here = gpu is None and not _has_cuda(device)
    if here and (gpu_memory is not None or ((gpus > 1 or nodes > 1) and device != "cpu")):
        raise ConfigError(f"there is no GPU here to measure; say which is planned for with --gpu: {', '.join(GPUS)}")
    if here and nodes > 1:
        raise ConfigError("--nodes: with model.device cpu a plan is for processes on this machine, --gpus of them")
    if gpu is not None:
        machine = from_table(gpu, dtype)
    else:
        machine = _present_gpu(device, dtype) if _has_cuda(device) else _present_cpu(dtype)
    if gpu_memory is not None:
        machine = replace(machine, memory=parse_bytes(gpu_memory))
    if machine.gpu:
        machine = replace(machine, links=links_of(card_of(machine.name), gpus, network))
    else:
        machine = replace(machine, memory=machine.memory // gpus)
    return replace(machine, count=gpus * nodes, nodes=nodes)


def card_of(name: str) -> str:
    """The key of GPUS that a card's name holds, the longest; the name itself where none."""
    plain = name.lower().replace(" ", "")
    return max((key for key in GPUS if key in plain), key=len, default=plain)


def from_table(name: str, dtype: str) -> Machine:
    """One of GPUS. dtype: the precision of the matrix products."""
    key = name.lower().replace(" ", "").replace("_", "-")
    key = key if key in GPUS else key.replace("-", "") if key.replace("-", "") in GPUS else key
    if key not in GPUS:
        raise ConfigError(f"--gpu {name}: not in the table ({', '.join(GPUS)}); name the nearest, and --gpu-memory for its memory")
    tensor, plain, bandwidth, memory = GPUS[key]
    rate = plain if dtype == "float32" else tensor
    return Machine(key.upper(), True, int(memory), None, ATTAINED * rate, ATTAINED_BANDWIDTH * bandwidth, GPU_KERNEL, CUDA_CONTEXT, False)


def parse_bytes(text: str) -> int:
    """80GB, 24 GiB, 512MB as bytes; a bare number is in GB."""
    found = re.fullmatch(r"\s*([\d.]+)\s*(?:([kmgt])(i?)b?)?\s*", text, re.IGNORECASE)
    with contextlib.suppress(ValueError):
        if found:
            power = " kmgt".index((found[2] or "g").lower())
            value = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
            if value > 0:
                return value
    raise ConfigError(f"--gpu-memory {text}: give a size such as 80GB or 24GiB")


def _has_cuda(device: str) -> bool:
    import torch

    return device != "cpu" and torch.cuda.is_available()


def _present_gpu(device: str, dtype: str) -> Machine:
    import torch

    where = torch.device("cuda" if device == "auto" else device)
    flops, bandwidth, kernel = measure(where, dtype, torch.cuda.synchronize)
    name, memory = torch.cuda.get_device_name(where), torch.cuda.mem_get_info(where)[1]
    return Machine(name, True, memory, host_memory(), flops, bandwidth, max(kernel, GPU_KERNEL), CUDA_CONTEXT, True)


def _present_cpu(dtype: str) -> Machine:
    import torch

    held = resident()  # torch, transformers and peft are loaded: what a run's libraries hold too
    flops, bandwidth, kernel = measure(torch.device("cpu"), dtype, lambda: None)
    found = hardware()
    memory = host_memory() or 0
    return Machine(f"{found['cpu']}, {torch.get_num_threads()} threads", False, memory, memory, flops, bandwidth, kernel, held, True)


def measure(device: torch.device | str, dtype: str, wait: Callable[[], object]) -> tuple[float, float, float]:
    """(operations a second of a matrix product, bytes a second of a copy, seconds of the smallest kernel), the best of a few tries."""
    import torch

    big = str(device).startswith("cuda")
    side, rows = (8192, 8192) if big else (1024, 512)
    a = torch.ones(rows, side, device=device, dtype=getattr(torch, dtype))
    b = torch.ones(side, side, device=device, dtype=getattr(torch, dtype))
    x = torch.ones((256 if big else 32) * 2**20, device=device, dtype=torch.uint8)
    y, small = torch.empty_like(x), torch.ones(16, 16, device=device)
    product = _best(lambda: a @ b, wait)
    copy = _best(lambda: y.copy_(x), wait)
    tiny = _best(lambda: [small + small for _ in range(100)], wait) / 100
    return 2 * rows * side * side / product, 2 * x.numel() / copy, PYTHON * tiny


def _best(work: Callable[[], object], wait: Callable[[], object], seconds: float = 0.25) -> float:
    """Shortest of the tries in so much time, and of five at least (the first meets cold memory), seconds."""
    best, until, tries = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < until or tries < 5:
        tries += 1
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def host_memory() -> int | None:
    """Bytes this process may use: the machine's, or its control group's limit."""
    limits: list[int] = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(path).read_text()))
    return min(limits, default=None)


def resident() -> int:
    """Resident memory of this process, bytes; where the system does not say, its peak."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
