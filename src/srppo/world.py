"""The processes of a run: one, or several started by torchrun, each of which runs the same program on its share of the rows.

All processes hold the same records and take the same decisions; rank 0 alone writes. What must be the same everywhere goes through the
few functions of World. In a plain process they do nothing, and torch.distributed is not touched.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from srppo.errors import ConfigError, LostProcess, SrppoError

if TYPE_CHECKING:  # the command answers --help before torch is loaded
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 writes a model, draws the report, or asks a vLLM server
MEETING = timedelta(minutes=10)  # for all to come: libraries load slowly from a busy network file system
LOOK_EVERY = 0.5  # seconds between two looks at whether another process has failed
# What torch.distributed says of a process that has gone.
PARTED = (
    "closed by peer",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
    "Timed out waiting",
)
FAILED = "failed"  # the key of the first failure
SAID = "said"  # the key of how many processes were about to tell of a Ctrl-C
GRACE = 4.0  # seconds that a process has, once another has failed, to end by an error of its own


@dataclass(frozen=True)
class World:
    """Which process this is, of how many. local_*: among those on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: ProcessGroup | None = None  # by which they speak; the default one if None

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def barrier(self) -> None:
        """Wait for all."""
        self.gather(None)

    def gather(self, item: T) -> list[T]:
        """Every process's item, by rank, to all."""
        if self.alone:
            return [item]
        items: list[Any] = [None] * self.size
        _dist().all_gather_object(items, item, group=self.group)
        return items

    def share(self, item: T) -> T:
        """Rank 0's item, to all."""
        if self.alone:
            return item
        box: list[Any] = [item if self.main else None]
        _dist().broadcast_object_list(box, src=0, group=self.group)
        shared: T = box[0]
        return shared

    def once(self, work: Callable[[], T]) -> T:
        """Let rank 0 alone do something, and give its result to all; where it raises, all do."""
        if self.alone:
            return work()
        result: tuple[bool, Any] = (True, None)
        if self.main:
            try:
                result = (True, work())
            except Exception as error:
                result = (False, error)
        done, value = self.share(_sendable(result) if self.main else result)
        if not done:
            raise value
        given: T = value
        return given

    def apart(self) -> World:
        """The same processes by a group of their own (gloo): what a thread says must not mix with what the training says. See `close`."""
        return self if self.alone else replace(self, group=_dist().new_group(backend="gloo", timeout=TIMEOUT))

    def close(self) -> None:
        """Give up the group that `apart` made."""
        if self.group is not None:
            _dist().destroy_process_group(self.group)

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do something that takes much memory, on each machine one process after the other."""
        for turn in range(self.most(self.local_size)):
            if turn == self.local_rank:
                result = work()
            self.barrier()
        return result

    def each(self, work: Callable[[], T]) -> list[T]:
        """Let every process do its share; the results by rank, to all. Where one raises, all raise the error of the first that did."""
        if self.alone:
            return [work()]
        try:
            mine: tuple[bool, Any] = (True, work())
        except Exception as error:
            mine = _sendable((False, error))
        everyone = self.gather(mine)
        for rank, (done, value) in enumerate(everyone):
            if not done:
                value.add_note(f"(in process {rank})")
                raise value
        return [value for _, value in everyone]

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if not self.alone:
            _dist().all_reduce(tensor, group=self.group)
        return tensor

    def check_alike(self, known: Mapping[str, str]) -> None:
        """Raise ConfigError where the processes do not have the same before them, by what it is: machines have files of their own."""
        everyone = self.gather(dict(known))
        for rank, theirs in enumerate(everyone):
            for name, value in theirs.items():
                if value != everyone[0][name]:
                    raise ConfigError(
                        f"process {rank} has another {name} than process 0; recipe, models, data and versions must be the same on all "
                        "machines"
                    )

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.alone else max(self.gather(flag))

    def most(self, count: int) -> int:
        """The largest of the processes' numbers."""
        return count if self.alone else max(self.gather(count))


_WORLD = World()
_WATCH: _Watch | None = None


def world() -> World:
    """The world this process is in."""
    return _WORLD


def launched() -> bool:
    """Whether torchrun (or something that sets its variables) has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def start_world() -> World:
    """Join the others, if there are any. Called again, it changes nothing.

    Raises ConfigError where torchrun's variables are incomplete or the others do not come.
    """
    global _WORLD, _WATCH
    if not launched() or not _WORLD.alone:
        return _WORLD
    import torch

    cuda, dist = torch.cuda.is_available(), _dist()
    try:
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if cuda:
            _check_gpus(local, torch.cuda.device_count())
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            store = _store(TIMEOUT) if _agent() else _meet(rank, size)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other variables that torchrun sets are missing or wrong ({error}); "
            "start several processes with: torchrun --nproc-per-node N -m srppo …"
        ) from None
    except ConfigError:
        raise
    except Exception as error:  # torch.distributed has many
        raise ConfigError(f"the {os.environ.get('WORLD_SIZE')} processes did not find each other: {error}") from error
    _WORLD = World(rank, size, local, local_size)
    _WATCH = _Watch(_WORLD)
    atexit.register(_leave)
    return _WORLD


def _check_gpus(local: int, gpus: int) -> None:
    if local >= gpus:
        raise ConfigError(
            f"process {local} of this machine has no GPU, as there are {gpus} (counted from 0). Start as many processes as GPUs, or hide "
            "them for a run on the CPU: CUDA_VISIBLE_DEVICES="
        )


def _dist() -> Any:
    import torch.distributed

    return torch.distributed


def _leave() -> None:
    """At the end of a process: part from the others, unless something went wrong and they may not answer."""
    if _WATCH is not None:
        well = not _WATCH.over
        if well:
            with contextlib.suppress(Exception):
                _WORLD.barrier()  # rank 0 may hold the store
        _WATCH.stop()
        if well:
            _dist().destroy_process_group()


@contextmanager
def world_of_run() -> Iterator[World]:
    """The world for as long as a run is worked on: an error in one process ends all of them within seconds.

    Ranks other than 0 say their error themselves, unless rank 0 has one too, which is then the one that counts.
    """
    here = start_world()
    try:
        yield here
    except BaseException as error:
        if _WATCH is not None:
            parted = isinstance(error, RuntimeError) and any(sign in str(error) for sign in PARTED)
            rank = _WATCH.failed(error, LostProcess.exit_code if parted else None)
            if isinstance(error, RuntimeError) and rank is not None:
                raise LostProcess(f"stopped, as process {rank} has failed") from error
            if parted:
                said = str(error).splitlines()[0]
                raise LostProcess(
                    f"another process of the run is gone: killed, out of memory, or not to be reached ({said}). Continue with --resume"
                ) from error
        raise


def _agent() -> bool:
    """Whether torchrun holds the store. It outlives a restart, with the addresses of the dead."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet(rank: int, size: int) -> Store:
    """The store, held by rank 0, in which the processes meet where no torchrun has brought them together.

    It asks again and again, as Ctrl-C waits for a call of torch's to end. Raises TimeoutError, or torch's errors, where some do not come.
    """
    dist, host, port = _dist(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + MEETING.total_seconds()
    while rank and not _answers(host, port):
        if time.monotonic() > end:
            raise TimeoutError(f"process 0 did not come to {host}:{port}")
        time.sleep(LOOK_EVERY)
    found = dist.TCPStore(host, port, size, is_master=rank == 0, timeout=MEETING, wait_for_workers=False, multi_tenant=True)
    found.set(f"here/{rank}", "")
    while not found.check([f"here/{other}" for other in range(size)]):
        if time.monotonic() > end:
            came = sum(found.check([f"here/{other}"]) for other in range(size))
            raise TimeoutError(f"{came} of {size} came within {MEETING.total_seconds() / 60:.3g} minutes")
        time.sleep(LOOK_EVERY)
    found.set_timeout(TIMEOUT)
    store: Store = dist.PrefixStore("meeting", found)
    return store


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there. torch would ask by itself, but log a page for each time that nobody did."""
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError:
        return False
    return True


def _store(timeout: timedelta) -> Store:
    """A connection to where the processes meet. Keys of a start are apart from those of one before that torchrun has begun again."""
    dist, host, port = _dist(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Store = dist.PrefixStore(
        f"srppo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout),
    )
    return store


class _Watch:
    """Tells the others of an error in this process, and ends this one some seconds after an error in another.

    It goes through the store in which the processes have met, on connections of its own: the process itself may hang in a collective.
    """

    def __init__(self, here: World):
        self._here, self._over = here, threading.Event()
        self.over = False
        self._telling, self._looking = (_store(timedelta(seconds=30)) for _ in range(2))
        self._thread = threading.Thread(target=self._look, name="srppo-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. One that were still inside the store when Python ends would take the process down with SIGABRT."""
        self.over = True
        self._over.set()
        self._thread.join(timeout=10)

    def failed(self, error: BaseException, exit_code: int | None = None) -> int | None:
        """Tell the others. Of an error that another process says `told` is set: rank 0 if it has one too, else the first that had one.
        Returns who failed before, if another did."""
        if self.over:
            return None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's to the others of one that died: the error is still to be told
        self.stop()
        try:
            earlier = int(self._telling.get(FAILED).decode().split()[0]) if self._telling.check([FAILED]) else None
            if isinstance(error, RuntimeError) and earlier is not None:  # it follows from that one
                return earlier
            self._telling.set(f"{FAILED}/{self._here.rank}", "")
            if earlier is None:
                code = exit_code or getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
                self._telling.set(FAILED, f"{self._here.rank} {code}")
            told = self._here.main and self._said(error)
            time.sleep(2 * LOOK_EVERY)  # rank 0 may hold the store that the others look into
            if not self._here.main:
                told = earlier is not None or self._telling.check([f"{FAILED}/0"]) or self._said(error)
            error.__dict__["told"] = told
        except Exception:  # the store is gone, and with it whoever was to be told
            pass
        return None

    def _said(self, error: BaseException) -> bool:
        """Whether another process has told of a Ctrl-C, which is one for all: rank 0 may come to it late, out of a collective."""
        return isinstance(error, KeyboardInterrupt) and self._telling.add(SAID, 1) > 1

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY):
            try:
                if not self._looking.check([FAILED]):
                    continue
                rank, code = map(int, self._looking.get(FAILED).decode().split())
            except Exception:  # the store is gone, and whoever held it
                if not self._over.wait(5 * GRACE):
                    sys.stderr.write("srppo: stopped, as the process that held the run together is gone; continue with --resume\n")
                    sys.stderr.flush()
                    os._exit(LostProcess.exit_code)
                return
            if self._over.wait(GRACE):
                return
            sys.stderr.write(f"srppo: stopped, as process {rank} has failed\n" if self._here.main else "")
            sys.stderr.flush()
            os._exit(code)


def _sendable(result: tuple[bool, Any]) -> tuple[bool, Any]:
    """An error of a class that cannot travel becomes a plain one."""
    done, value = result
    if done:
        return result
    import pickle

    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        plain = SrppoError(str(value) if isinstance(value, SrppoError) else f"{type(value).__name__}: {value}")
        plain.exit_code = getattr(value, "exit_code", 1)
        return False, plain
    return result


def deal(costs: Sequence[float], hands: int) -> list[list[int]]:
    """Indices dealt so that the sums of their costs are nearly equal: the dearest first, each to the hand that has least so far
    (Graham 1969, doi 10.1137/0117039: at most 4/3 of the best). Each hand is in ascending order."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [0.0] * hands
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(hands), key=lambda h: (sums[h], len(dealt[h]), h))
        dealt[least].append(i)
        sums[least] += costs[i]
    return [sorted(hand) for hand in dealt]
