"""What the machine gives this process: cores, quota, how busy others keep it. Read from /proc and cgroups; None where a system has none."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # of /proc's CPU times, a second


def allowed_cores() -> list[int] | None:
    """The cores that the affinity mask leaves; None where a system has no mask."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def core_count() -> int:
    """Cores this process may run on, whatever its quota of their time."""
    allowed = allowed_cores()
    return len(allowed) if allowed is not None else (os.cpu_count() or 1)


def cpu_max(text: str) -> float | None:
    """Cores from cgroup v2's cpu.max, "quota period" in microseconds; None for "max" (no limit)."""
    quota, _, period = text.strip().partition(" ")
    return None if quota == "max" else int(quota) / int(period or 100_000)


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """Cores' worth of CPU time that the control groups of this process allow, the tightest of them and their parents; None: no limit."""
    limits = []
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            inside = str(group).lstrip("/")
            with contextlib.suppress(ValueError, ZeroDivisionError):
                if not controllers:
                    text = _text(cgroups / inside / "cpu.max")
                    limits.append(cpu_max(text) if text else None)
                elif "cpu" in controllers.split(","):
                    quota, period = (_text(cgroups / "cpu" / inside / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
                    limits.append(int(quota) / int(period) if quota and int(quota) > 0 else None)
    return min((limit for limit in limits if limit is not None), default=None)


def _text(path: Path) -> str:
    """A file's content; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Reading:
    """Counters of one moment; all in seconds unless said."""

    wall: float
    cpu: float  # of this process
    switches: int  # involuntary context switches of this process
    threads: dict[int, tuple[float, float]]  # id of each of its threads: on a core, ready but waiting for one. Empty: not known
    busy: float | None  # of the cores it may use, all processes together


@dataclass(frozen=True)
class Spell:
    """What happened between two readings; seconds unless said."""

    wall: float
    cpu: float  # of this process, summed over its threads
    waited: float | None  # its threads' time ready to run but without a core, summed
    switches: int  # involuntary context switches
    others: float | None  # cores that other processes kept busy, on average

    @property
    def waited_share(self) -> float | None:
        """Of the time that its threads wanted a core, the share they had none."""
        wanted = None if self.waited is None else self.cpu + self.waited
        return None if wanted is None or self.waited is None else self.waited / max(wanted, 1e-9)


def read(proc: Path = PROC) -> Reading:
    """Now. Costs a tenth of a millisecond or so for every ten threads."""
    switches = 0
    if sys.platform != "win32":
        import resource

        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return Reading(
        time.perf_counter(), time.process_time(), switches, dict(_threads(proc)), busy_seconds(_text(proc / "stat"), allowed_cores())
    )


def _threads(proc: Path) -> Iterator[tuple[int, tuple[float, float]]]:
    try:
        names = os.listdir(proc / "self/task")
    except OSError:
        return
    for name in names:
        fields = _text(proc / "self/task" / name / "schedstat").split()  # nanoseconds on a core, waiting for one, and turns
        if len(fields) == 3:
            yield int(name), (int(fields[0]) / 1e9, int(fields[1]) / 1e9)


def busy_seconds(stat: str, cores: list[int] | None) -> float | None:
    """From /proc/stat: seconds that the cores (all by default) were busy since the machine started; None where it does not say.

    Time of processes with a positive niceness is left out unless this process is such a one: they make way for it.
    """
    wanted = None if cores is None else {f"cpu{core}" for core in cores}
    polite = hasattr(os, "nice") and os.nice(0) > 0
    total, found = 0, False
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and (name in wanted if wanted is not None else name == "cpu"):
            user, nice, system, _, _, irq, soft, steal, *_ = (*map(int, fields), 0, 0, 0, 0)
            total, found = total + user + system + irq + soft + steal + polite * nice, True
    return total / TICK if found and total else None


def between(before: Reading, after: Reading) -> Spell:
    """What happened from one reading to the other. Threads that ended meanwhile are not known of any more."""
    wall, cpu = max(after.wall - before.wall, 1e-9), after.cpu - before.cpu
    waited = None
    if after.threads:
        waited = sum(after.threads[t][1] - before.threads.get(t, (0.0, 0.0))[1] for t in after.threads)
    others = None
    if before.busy is not None and after.busy is not None:
        others = max(0.0, after.busy - before.busy - cpu) / wall
    return Spell(wall, cpu, waited, after.switches - before.switches, others)


@dataclass(frozen=True)
class Machine:
    """What there is for this run, when it starts."""

    cores: int  # that it may run on
    quota: float | None = None  # cores' worth of time that it may use of them
    busy: float = 0.0  # cores that others keep busy
    busiest: str = ""  # who of them most, in words; "" where not known

    @property
    def usable(self) -> int:
        """Cores, or the quota where that is less: threads beyond it are stopped for a part of every tenth of a second."""
        return self.cores if self.quota is None else max(1, min(self.cores, int(self.quota)))

    @property
    def free(self) -> int:
        """Of those, what others leave; at least one."""
        return max(1, min(self.usable, round(self.cores - self.busy)))


def look(seconds: float = 0.25, proc: Path = PROC) -> Machine:
    """Cores, quota and, watched for so many seconds, how busy others are; by the load average where the kernel does not say."""
    cores, quota = core_count(), cpu_quota(proc)
    before, processes = read(proc), dict(_process_times(proc))
    time.sleep(seconds)
    spell = between(before, read(proc))
    if spell.others is None:
        return Machine(cores, quota, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)
    used = {key: (now - processes[key]) / spell.wall for key, now in _process_times(proc) if key in processes and key[0] != os.getpid()}
    (pid, name), most = max(used.items(), key=lambda item: item[1], default=((0, ""), 0.0))
    return Machine(cores, quota, spell.others, f"{name}, process {pid}" if most >= 0.25 else "")


def _process_times(proc: Path) -> Iterator[tuple[tuple[int, str], float]]:
    """((id, name), CPU seconds so far) of every process that can be seen."""
    try:
        names = [name for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        return
    for name in names:
        head, _, fields = _text(proc / name / "stat").rpartition(")")  # a name may hold spaces and parentheses
        values = fields.split()
        if len(values) > 12:
            yield (int(name), head.partition("(")[2]), (int(values[11]) + int(values[12])) / TICK
