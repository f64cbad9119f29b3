"""The processes of a run: one, or several started by torchrun, each of which runs the same program on its share of the rows.

All processes hold the same records and take the same decisions; rank 0 alone writes. What must be the same everywhere goes through the
few functions of World. In a plain process they do nothing, and torch.distributed is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from srppo.errors import ConfigError, SrppoError

if TYPE_CHECKING:  # the command answers --help before torch is loaded
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 writes a model, draws the report, or asks a vLLM server


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


def world() -> World:
    """The world this process is in."""
    return _WORLD


def enter(here: World) -> None:
    """Make that the world this process is in (meeting.start_world)."""
    global _WORLD
    _WORLD = here


def _dist() -> Any:
    import torch.distributed

    return torch.distributed


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
