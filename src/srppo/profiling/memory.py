"""The most memory that was in use between two moments, MiB: of the process, and of the GPU.

Linux keeps the peak of a process's resident memory and resets it on demand, CUDA's allocator likewise. Spells may lie inside one another,
though each reset forgets the peak for all: so what was seen before a reset is remembered for every open spell.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

MIB = 1024 * 1024
SAMPLED_EVERY = 0.05  # seconds, where the kernel's peak cannot be reset


class Source(Protocol):
    """A peak since the last reset."""

    def peak(self) -> dict[str, float]:
        """MiB, by the name's ending: "" for the main figure."""

    def reset(self) -> None: ...


class KernelPeak:
    """Linux: VmHWM, which writing 5 to clear_refs sets back to the memory in use."""

    def __init__(self, process: Path = Path("/proc/self")):
        self._status, self._clear = process / "status", process / "clear_refs"

    def peak(self) -> dict[str, float]:
        for line in self._status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return {"": int(line.split()[1]) / 1024}
        raise OSError("no VmHWM")

    def reset(self) -> None:
        self._clear.write_text("5", encoding="ascii")

    def works(self) -> bool:
        """Try it: some sandboxes take the write and do nothing."""
        size = 8 * MIB
        try:
            self.reset()
            with mmap.mmap(-1, size) as block:
                block.write(b"\1" * size)
            before = self.peak()[""]
            self.reset()
            return self.peak()[""] < before - size / MIB / 2
        except (OSError, ValueError):
            return False


class SampledPeak:
    """Linux without that: a thread that looks at the memory in use twenty times a second. Short peaks are missed."""

    def __init__(self, statm: Path = Path("/proc/self/statm")):
        self._statm, self._page = statm, mmap.PAGESIZE / MIB
        self._highest, self._lock = self._now(), threading.Lock()
        threading.Thread(target=self._sample, name="srppo-memory", daemon=True).start()

    def _now(self) -> float:
        return int(self._statm.read_text(encoding="ascii").split()[1]) * self._page

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(SAMPLED_EVERY):
            with contextlib.suppress(OSError):
                self.peak()

    def peak(self) -> dict[str, float]:
        with self._lock:  # else a look that began before a reset would bring the old peak back
            self._highest = max(self._highest, self._now())
            return {"": self._highest}

    def reset(self) -> None:
        with self._lock:
            self._highest = self._now()


class WholePeak:
    """Elsewhere (macOS): the peak since the process began, which nothing resets."""

    def peak(self) -> dict[str, float]:
        import resource

        return {"": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)}

    def reset(self) -> None:
        pass


class CudaPeak:
    """What the allocator gave to tensors, and (`_reserved`) what it took from the GPU for that."""

    def __init__(self, device: torch.device):
        self._device = device

    def peak(self) -> dict[str, float]:
        import torch

        allocated, reserved = torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
        return {"": allocated / MIB, "_reserved": reserved / MIB}

    def reset(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)


class Peaks:
    """Peaks of spells that may lie inside one another. One for each source: a reset is seen by all."""

    def __init__(self, source: Source):
        self._source, self._open = source, list[dict[str, float]]()
        self.highest: dict[str, float] = {}  # since the process began

    def _absorb(self) -> None:
        seen = self._source.peak()
        for spell in (self.highest, *self._open):
            for name, value in seen.items():
                spell[name] = max(spell.get(name, 0.0), value)
        self._source.reset()

    @contextlib.contextmanager
    def spell(self) -> Iterator[dict[str, float]]:
        """What is given is filled when the spell is over."""
        self._absorb()
        found: dict[str, float] = {}
        self._open.append(found)
        try:
            yield found
        finally:
            self._absorb()
            self._open.pop()

    def so_far(self) -> dict[str, float]:
        """The peak since the process began."""
        self._absorb()
        return dict(self.highest)


@functools.cache
def resident() -> Peaks:
    """Of this process's resident memory."""
    kernel = KernelPeak()
    whole = WholePeak()
    known = whole.peak()  # trying the reset would forget it
    source: Source = whole
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            source = kernel if kernel.works() else SampledPeak()
    peaks = Peaks(source)
    peaks.highest = known
    return peaks


@functools.cache
def _cuda(index: int) -> Peaks:
    import torch

    return Peaks(CudaPeak(torch.device("cuda", index)))


def of_device(device: torch.device) -> Peaks:
    """Of the memory that decides whether a model fits: the GPU's, or the process's."""
    if device.type != "cuda":
        return resident()
    import torch

    return _cuda(torch.cuda.current_device() if device.index is None else device.index)
