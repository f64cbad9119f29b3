"""Saving a stage's checkpoints one after the other, at once or by a thread while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path

from torch import Tensor

from srppo.profiling.traffic import BESIDE
from srppo.train.checkpoint import Checkpoint, flat, save_checkpoint
from srppo.world import world


class Saver:
    """Saves the checkpoints of a folder and keeps the last `keep`. A context manager: at its end all are written.

    In the background the tensors are copied to the CPU's memory first, and a thread writes them while training goes on. What it fails
    with is raised by the next `save`, `check` or `wait`, or at the end.
    """

    def __init__(self, folder: Path, keep: int, background: bool = False):
        self._folder, self._keep, self._background = folder, keep, background
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last: int | None = None  # step that was saved last
        self._apart = world().apart() if background else world()

    def save(self, checkpoint: Checkpoint) -> None:
        """Raises RunFolderError when the disk is full or not writable. A step that this has saved already is the same state."""
        self.wait()
        if checkpoint.step == self._last:
            return
        self._last = checkpoint.step
        if not self._background:
            save_checkpoint(self._folder, checkpoint, self._keep)
            return
        self._thread = threading.Thread(target=self._write, args=(checkpoint, staged(checkpoint)), name=BESIDE)
        self._thread.start()

    def _write(self, checkpoint: Checkpoint, copies: dict[str, Tensor]) -> None:
        try:
            save_checkpoint(self._folder, checkpoint, self._keep, copies=copies, here=self._apart)
        except BaseException as error:  # for the thread that trains
            self._failure = error

    def check(self) -> None:
        """Raise what a finished write failed with. With several processes only `wait` does, which they reach together."""
        if self._thread is not None and not self._thread.is_alive() and self._apart.alone:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises RunFolderError where that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # the error on its way is the one to tell
            self._thread.join()
        self._apart.close()


def staged(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """This process's parts of all tensors, by group/name, copied to the CPU."""
    from srppo.train.checkpoint_storage import local  # slow to import, and needed only here

    return {name: local(tensor).to("cpu", copy=True) for name, tensor in flat(checkpoint.tensors).items()}
