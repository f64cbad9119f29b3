"""How many CPU threads to compute with, and a word when they get in each other's way.

Threads that share a matrix product wait for one another, and OpenMP waits by spinning. Where other processes take a core away, the threads
that have one burn it waiting for the thread that has none: two threads on a busy two-core machine can be ten times slower than one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from srppo.machine import Machine, Reading, Spell, between, look, read
from srppo.progress import Progress, Stage
from srppo.world import world

WINDOW = 10.0  # seconds of a run that are judged together
WAITED_SHARE = 0.2  # of the time that threads wanted a core: above it they are in each other's way
LOW_USE, SWITCHES = 0.7, 50  # where waiting cannot be read: CPU time / (threads x wall time) below, involuntary switches a CPU second above


def choose_threads(wanted: int | None, machine: Machine) -> tuple[int, str]:
    """Threads and why, in a line. wanted: the configuration's word; then OMP_NUM_THREADS's; then what the machine has free."""
    environment = os.environ.get("OMP_NUM_THREADS", "")
    if wanted is not None:
        return wanted, f"threads: {wanted}, as configured{_objection(wanted, machine)}"
    if environment.isdigit() and int(environment) > 0:
        return int(environment), f"threads: {environment}, from OMP_NUM_THREADS{_objection(int(environment), machine)}"
    why = [*_limits(machine), *([_neighbours(machine)] if machine.free < machine.usable else [])]
    if not why:
        return machine.free, f"threads: {machine.free}"
    return machine.free, f"threads: {machine.free} of {machine.cores} cores; {'; '.join(why)} (set `threads` to decide yourself)"


def _limits(machine: Machine) -> list[str]:
    return (
        [f"the control group allows {machine.quota:.3g} cores' time"]
        if machine.quota is not None and machine.usable < machine.cores
        else []
    )


def _neighbours(machine: Machine) -> str:
    return f"others keep about {machine.busy:.1f} busy" + (f" ({machine.busiest})" if machine.busiest else "")


def _objection(count: int, machine: Machine) -> str:
    """What speaks against so many threads; "" where nothing does."""
    if count > machine.usable:
        have = "; ".join([f"the machine has {machine.cores} cores for this run", *_limits(machine)])
        return f"; {have}, and more threads than that are slower: try `threads: {machine.free}`"
    if count > max(1, machine.free):
        return f"; {_neighbours(machine)}, and threads that wait for a core are far slower than fewer: try `threads: {machine.free}`"
    return ""


def set_threads(wanted: int | None) -> str:
    """Apply choose_threads to torch; returns the reason, to be shown. Where more than one is in question it looks at the machine first."""
    import torch

    settled = wanted if wanted is not None else os.environ.get("OMP_NUM_THREADS")
    machine = Machine(1) if str(settled) == "1" else look()
    count, reason = choose_threads(wanted, machine)
    if settled is None and (processes := world().local_size) > 1:
        count = max(1, count // processes)
        reason += f", shared by {processes} processes: {count} each"
    torch.set_num_threads(count)
    return reason


def crowded(threads: int, spell: Spell) -> bool:
    """Whether the threads were in each other's way: they were ready to run and had no core for much of the time."""
    if threads < 2 or spell.wall < WINDOW:
        return False
    share = spell.waited_share
    if share is not None:
        return share >= WAITED_SHARE and spell.cpu + (spell.waited or 0.0) > 0.5 * spell.wall  # a process that sleeps is not slowed down
    return spell.cpu < LOW_USE * threads * spell.wall and spell.switches > SWITCHES * max(spell.cpu, 1e-9)


def remedy(threads: int, machine: Machine, spell: Spell) -> str:
    """The warning for a crowded spell."""
    told = spell.waited_share
    symptom = "they are interrupted all the time" if told is None else f"{100 * told:.0f} % of the time a thread wants a core it has none"
    others = (
        "" if spell.others is None or spell.others < 0.5 else f"; other processes keep {spell.others:.1f} of {machine.cores} cores busy"
    )
    free = Machine(machine.cores, machine.quota, spell.others or 0.0).free
    fewer = free if free < threads else max(1, threads // 2)
    return (
        f"{threads} threads compete for cores ({symptom}{others}). Threads wait for one another by spinning, so fewer are often many times "
        f"faster: stop with Ctrl-C and go on with --resume --threads {fewer} (`threads: {fewer}` in the recipe)"
    )


class ThreadWatch:
    """Judges every WINDOW seconds of a run; warns once."""

    def __init__(self, warn: Callable[[str], None], threads: Callable[[], int], reading: Callable[[], Reading] = read):
        self._warn, self._threads, self._read = warn, threads, reading
        self._before: Reading | None = reading()

    def check(self) -> None:
        """At any moment of the run; costs nothing to speak of unless WINDOW seconds have passed since the last judgement."""
        if self._before is None or time.perf_counter() - self._before.wall < WINDOW:
            return
        now, threads = self._read(), self._threads()
        spell = between(self._before, now)
        self._before = now
        if crowded(threads, spell):
            from srppo.machine import core_count, cpu_quota

            self._warn(remedy(threads, Machine(core_count(), cpu_quota()), spell))
            self._before = None


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


class Watched:
    """A Progress that lets a ThreadWatch judge whenever a stage advances: every loop of a run reports here."""

    def __init__(self, progress: Progress, watch: ThreadWatch):
        self._progress, self._watch = progress, watch

    @contextlib.contextmanager
    def stage(self, title: str, total: int, unit: str, start: int = 0) -> Iterator[Stage]:
        watch = self._watch

        class Ticker:
            def advance(self, done: int, **metrics: float) -> None:
                inner.advance(done, **metrics)
                watch.check()

        with self._progress.stage(title, total, unit, start) as inner:
            yield Ticker()

    def note(self, text: str) -> None:
        self._progress.note(text)

    def warn(self, text: str) -> None:
        self._progress.warn(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._progress.table(title, columns, rows)
