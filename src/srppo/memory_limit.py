"""When memory runs out in a micro-batch: what it held is let go, the size is halved, and the work is done again (ours).

Sizes are known by the key of the recipe that asks for them. What was found to fit holds for the rest of the process; a resumed run asks
for the recipe's size again. Results do not depend on these sizes, beyond rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from srppo.errors import MemoryRanOut, TrainingStopped
from srppo.world import world

T = TypeVar("T")
SIGNS = ("can't allocate memory", "DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or in the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


class MemoryLimits:
    """The sizes that memory has allowed so far in a run."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, tell: Callable[[str], None] = lambda text: None, apart: bool = True) -> None:
        """Forget what was found. tell: is given a warning at each halving. apart: False where the weights are spread over processes,
        which must then all run a model as often as each other: one of them cannot start again by itself."""
        self._tell, self._apart = tell, apart
        self._sizes: dict[str, int] = {}
        self._news: list[str] = []
        self.halved = 0  # how often, in all processes that have been heard

    def size(self, key: str, asked: int) -> int:
        """What to use where the recipe asks for so much."""
        return min(asked, self._sizes.get(key, asked))

    def within(self, key: str, asked: int, least: int, work: Callable[[int], T], *, alone: bool = False) -> T:
        """work(size), again with half of it for as long as memory runs out. It must be such that it can begin anew.

        least: a size that cannot be divided: one row's tokens, or one row. alone: no other process waits for this one in `work`, wherever
        the weights are. Raises TrainingStopped where the least does not fit either, MemoryRanOut where it cannot
        begin anew, and of several processes in either case.
        """
        while True:
            size = self.size(key, asked)
            try:
                return work(size)
            except Exception as error:
                if not ran_out(error):
                    raise
                reason = " ".join(str(error).split())[:200]
            # Only here, where the error is gone, is what it held gone too.
            if not (self._apart or alone):
                raise MemoryRanOut(
                    f"memory ran out with {key} {size}, in one of several processes that share the weights ({reason}); lower {key} and "
                    "continue with --resume"
                )
            if size <= least:
                raise (TrainingStopped if world().alone else MemoryRanOut)(
                    f"memory ran out with {key} {size}, when {'one row was' if least > 1 else 'what cannot be halved was'} worked on "
                    f"({reason}); `srppo plan` says what would make room, such as shorter rows or tuning.kind lora"
                )
            self._sizes[key] = size // 2
            self.halved += 1
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            said = f"memory ran out with {key} {size}; it is {size // 2} from here on, and the step is done again ({reason})"
            self._news.append(said)
            self._tell(said)

    def news(self) -> list[str]:
        """What was told here since this was last asked."""
        news, self._news = self._news, []
        return news

    def hear(self, everyone: list[list[str]]) -> None:
        """Take in every process's news, by rank: those of the others are told too, as they do not speak themselves."""
        for rank, news in enumerate(everyone):
            if rank != world().rank:
                self.halved += len(news)
                for said in news:
                    self._tell(f"process {rank}: {said}")

    def metrics(self) -> dict[str, float]:
        """For a record: how often memory ran out, if it ever did."""
        return {"memory/halved": float(self.halved)} if self.halved else {}


limits = MemoryLimits()
