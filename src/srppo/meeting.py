"""How the processes of a run come together, watch over one another, and part."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from srppo.errors import ConfigError, LostProcess
from srppo.watch import LOOK_EVERY, Watch, meeting_store
from srppo.world import TIMEOUT, World, enter, world

if TYPE_CHECKING:  # the command answers --help before torch is loaded
    from torch.distributed import Store

MEETING = timedelta(minutes=10)  # for all to come: libraries load slowly from a busy network file system
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
_WATCH: Watch | None = None


def launched() -> bool:
    """Whether torchrun (or something that sets its variables) has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def start_world() -> World:
    """Join the others, if there are any. Called again, it changes nothing.

    Raises ConfigError where torchrun's variables are incomplete or the others do not come.
    """
    global _WATCH
    if not launched() or not world().alone:
        return world()
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    try:
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if cuda:
            _check_gpus(local, torch.cuda.device_count())
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            store = meeting_store(TIMEOUT) if _agent() else _meet(rank, size)
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
    enter(World(rank, size, local, local_size))
    _WATCH = Watch(world())
    atexit.register(_leave)
    return world()


def _check_gpus(local: int, gpus: int) -> None:
    if local >= gpus:
        raise ConfigError(
            f"process {local} of this machine has no GPU, as there are {gpus} (counted from 0). Start as many processes as GPUs, or hide "
            "them for a run on the CPU: CUDA_VISIBLE_DEVICES="
        )


def _leave(destroy: bool = True) -> None:
    """At the end of a process: part from the others, unless something went wrong and they may not answer."""
    import torch.distributed as dist

    if _WATCH is not None:
        well = not _WATCH.over
        if well:
            with contextlib.suppress(Exception):
                world().barrier()  # rank 0 may hold the store
        _WATCH.stop()
        if well and destroy:
            dist.destroy_process_group()


def end(code: int) -> None:
    """One of several processes ends here, for good; in a plain one this does nothing.

    What was registered for the end is done, but nothing is taken apart: a thread of a library that was still at work then was seen to
    take the finished process down with SIGABRT, which torchrun takes for a failure of the run.
    """
    if world().alone:
        return
    atexit.unregister(_leave)
    _leave(destroy=False)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
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
