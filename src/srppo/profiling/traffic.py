"""What this process sends to the others of a run: bytes, collectives and seconds, by kind."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# Functions of torch.distributed, and which of their arguments says how much is moved (torch 2.13's *_single are 2.11's other names).
KINDS = {
    "all_gather_single": ("all-gather", "input_tensor"),
    "all_gather_into_tensor": ("all-gather", "input_tensor"),
    "all_gather": ("all-gather", "tensor"),
    "reduce_scatter_single": ("reduce-scatter", "output"),
    "reduce_scatter_tensor": ("reduce-scatter", "output"),
    "all_reduce": ("all-reduce", "tensor"),
    "broadcast": ("broadcast", "tensor"),
}


BESIDE = "srppo-checkpoint"  # the thread that writes while training goes on: not of what the round sends


def sent(kind: str, size: int, group: int) -> float:
    """Bytes that each of `group` processes sends in a ring. size: of its own part (all-gather: what it gives, reduce-scatter: what it
    gets, others: the whole tensor). See planning/processes.py; a broadcast counts whole in each."""
    if kind == "all-reduce":
        return 2 * size * (group - 1) / group
    return size if kind == "broadcast" else size * (group - 1)


class Traffic:
    """Sums since the last `take`. seconds: from call to return, waiting for the others included; on a GPU collectives return at once."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.seconds = 0.0

    def take(self) -> dict[str, float]:
        """The metrics since the last call: comm/bytes, comm/calls, timing/comm."""
        out = {"comm/bytes": float(sum(self.bytes.values())), "comm/calls": float(sum(self.calls.values())), "timing/comm": self.seconds}
        self.bytes.clear()
        self.calls.clear()
        self.seconds = 0.0
        return out


@contextmanager
def counted(traffic: Traffic) -> Iterator[Traffic]:
    """Count what goes through torch.distributed's functions within, FSDP2's collectives included (it calls them by these names), those of
    a DTensor's full_tensor() not."""
    inside = threading.local()
    before: list[tuple[Any, str, Callable[..., Any]]] = []
    for module in (dist, distributed_c10d):
        for name, (kind, argument) in KINDS.items():
            function = getattr(module, name, None)
            if function is not None:
                before.append((module, name, function))
                setattr(module, name, _counting(function, kind, argument, traffic, inside))
    try:
        yield traffic
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _counting(function: Callable[..., Any], kind: str, argument: str, traffic: Traffic, inside: threading.local) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        by_way = getattr(inside, "busy", False)  # one of them by way of another
        if by_way or threading.current_thread().name == BESIDE:  # on a GPU backward passes have threads of their own
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        tensor: Tensor = given[argument]
        inside.busy, begun = True, time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            inside.busy = False
            traffic.seconds += time.perf_counter() - begun
            traffic.calls[kind] += 1
            traffic.bytes[kind] += round(sent(kind, tensor.nbytes, dist.get_world_size(given.get("group"))))

    return call
