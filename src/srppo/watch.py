"""What every process of several keeps an eye on: whether another has failed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from srppo.errors import LostProcess
from srppo.world import World

if TYPE_CHECKING:  # the command answers --help before torch is loaded
    from torch.distributed import Store

LOOK_EVERY = 0.5  # seconds between two looks at whether another process has failed
FAILED = "failed"  # the key of the first failure
SAID = "said"  # the key of how many processes were about to tell of a Ctrl-C
GRACE = 4.0  # seconds that a process has, once another has failed, to end by an error of its own


def meeting_store(timeout: timedelta) -> Store:
    """A connection to where the processes meet. Keys of a start are apart from those of one before that torchrun has begun again."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Store = dist.PrefixStore(
        f"srppo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout),
    )
    return store


class Watch:
    """Tells the others of an error in this process, and ends this one some seconds after an error in another.

    It goes through the store in which the processes have met, on connections of its own: the process itself may hang in a collective.
    """

    def __init__(self, here: World):
        self._here, self._over = here, threading.Event()
        self.over = False
        self._telling, self._looking = (meeting_store(timedelta(seconds=30)) for _ in range(2))
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
