"""The processes that train together, as far as checkpoints need them; one where there is no distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """rank: of this process, from 0. size: how many there are. options: what torch.distributed.checkpoint is to be told of them."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if several else (0, 1)
        self.options: dict[str, Any] = {"process_group": group} if several else {"no_dist": True}
        self._group = group

    def gather(self, value: T) -> list[T]:
        """Each process's value."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self._group)
        return out

    def first(self, work: Callable[[], T]) -> T:
        """What process 0 finds or raises, everywhere."""
        found: Any = None
        failure: Exception | None = None
        if self.rank == 0:
            try:
                found = work()
            except Exception as error:
                failure = error
        found, failure = self.gather((found, failure))[0]
        if failure is not None:
            raise failure
        return found
