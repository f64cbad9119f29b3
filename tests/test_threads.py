"""Threads: the configuration's word, then the environment's, then what the machine has free; and a word once they compete for cores."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from srppo import threads
from srppo.machine import Machine, Reading, Spell, between, busy_seconds, cpu_max, cpu_quota, look
from srppo.progress import make_progress
from srppo.threads import WINDOW, ThreadWatch, Watched, choose_threads, crowded, remedy

IDLE = Machine(8)


# --- the choice at the start


def test_configuration_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(2, IDLE) == (2, "threads: 2, as configured")
    count, reason = choose_threads(16, IDLE)
    assert count == 16 and "8 cores for this run" in reason and "try `threads: 8`" in reason


def test_environment_comes_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(None, IDLE) == (3, "threads: 3, from OMP_NUM_THREADS")
    count, reason = choose_threads(None, Machine(2))
    assert count == 3 and "more threads than that are slower: try `threads: 2`" in reason
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert choose_threads(None, IDLE)[0] == 8


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (IDLE, 8),
        (Machine(8, busy=0.2), 8),
        (Machine(8, busy=5.1), 3),
        (Machine(2, busy=9.0), 1),
        (Machine(8, quota=2.5), 2),  # two and a half cores' time: a third thread would stand still half of it
        (Machine(8, quota=0.5), 1),
        (Machine(2, quota=16.0), 2),
        (Machine(64, quota=4.0, busy=40.0), 4),  # others on other cores take nothing from the quota
        (Machine(64, quota=32.0, busy=40.0), 24),
    ],
)
def test_a_busy_or_limited_machine_gets_fewer(machine: Machine, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    count, reason = choose_threads(None, machine)
    assert count == expected and "\n" not in reason
    assert ("others keep" in reason) is (machine.free < machine.usable)
    assert ("control group" in reason) is (machine.usable < machine.cores)


def test_asking_for_a_busy_core_is_advised_against(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(2, busy=1.02, busiest="python, process 7")
    assert choose_threads(2, machine)[1] == (
        "threads: 2, as configured; others keep about 1.0 busy (python, process 7), and threads that wait for a core are far slower than "
        "fewer: try `threads: 1`"
    )
    assert choose_threads(1, machine)[1] == "threads: 1, as configured"


def test_one_thread_needs_no_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "look", lambda: pytest.fail("looked"))
    assert threads.set_threads(1) == "threads: 1, as configured"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.set_threads(None) == "threads: 1, from OMP_NUM_THREADS"


# --- what the machine says


@pytest.mark.parametrize(("text", "cores"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("50000 100000", 0.5), ("200000", 2.0)])
def test_cpu_max(text: str, cores: float | None) -> None:
    assert cpu_max(text) == cores


def test_the_tightest_group_of_the_path_is_the_quota(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (groups / "user/job").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/user/job\n")
    assert cpu_quota(proc, groups) is None
    (groups / "user/job/cpu.max").write_text("max 100000\n")
    (groups / "user/cpu.max").write_text("300000 100000\n")
    assert cpu_quota(proc, groups) == 3.0
    (groups / "user/job/cpu.max").write_text("150000 100000\n")
    assert cpu_quota(proc, groups) == 1.5
    (groups / "user/job/cpu.max").write_text("nonsense\n")
    assert cpu_quota(proc, groups) == 3.0
    assert cpu_quota(tmp_path / "none", groups) is None


def test_the_quota_of_a_version_1_group(tmp_path: Path) -> None:
    proc, group = tmp_path / "proc", tmp_path / "cgroup/cpu/box"
    (proc / "self").mkdir(parents=True)
    group.mkdir(parents=True)
    (proc / "self/cgroup").write_text("9:name=systemd:/\n3:cpu,cpuacct:/box\n2:memory:/box\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("-1", None), ("250000", 2.5)):
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert cpu_quota(proc, tmp_path / "cgroup") == cores


STAT = """cpu  1100 200 300 9000 50 10 20 30 0 0
cpu0 1000 0 200 100 50 10 20 30 0 0
cpu1 100 200 100 8900 0 0 0 0 0 0
intr 1 2 3
"""


@pytest.mark.skipif(os.name != "posix", reason="/proc is Linux's")
def test_busy_seconds_are_those_of_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundredths of a second: user, nice, system, idle, waiting for a disk, two kinds of interrupt, stolen."""
    monkeypatch.setattr("srppo.machine.TICK", 100)
    monkeypatch.setattr(os, "nice", lambda _: 0)
    assert busy_seconds(STAT, None) == pytest.approx(14.6)  # 1100 + 300 + 10 + 20 + 30
    assert busy_seconds(STAT, [0]) == pytest.approx(12.6)
    assert busy_seconds(STAT, [1]) == pytest.approx(2.0)
    monkeypatch.setattr(os, "nice", lambda _: 10)  # one of the polite itself: the others are rivals
    assert busy_seconds(STAT, [1]) == pytest.approx(4.0)
    assert busy_seconds("", None) is None and busy_seconds("cpu 0 0 0 0 0 0 0", None) is None


def test_between_two_readings() -> None:
    """In 10 s two threads ran 4 and 5 s and waited 1 and 4; a third ended, a fourth began. All processes took 15 s, this one 9.5."""
    before = Reading(100.0, 20.0, 7, {1: (10.0, 2.0), 2: (10.0, 3.0), 3: (1.0, 50.0)}, 500.0)
    after = Reading(110.0, 29.5, 27, {1: (14.0, 3.0), 2: (15.0, 7.0), 4: (0.5, 0.25)}, 515.0)
    spell = between(before, after)
    assert (spell.wall, spell.cpu, spell.switches) == (10.0, 9.5, 20)
    assert spell.waited == pytest.approx(5.25) and spell.others == pytest.approx(0.55)
    assert spell.waited_share == pytest.approx(5.25 / 14.75)
    blind = between(Reading(0.0, 0.0, 0, {}, None), Reading(1.0, 1.0, 0, {}, None))
    assert blind.waited is None and blind.waited_share is None and blind.others is None


def test_a_look_at_this_machine() -> None:
    found = look(0.02)
    assert 1 <= found.free <= found.usable <= found.cores <= (os.cpu_count() or 1) and found.busy >= 0


# --- the warning in a run


def spell(cpu: float = 10.0, waited: float | None = 0.0, *, wall: float = 10.0, switches: int = 0, others: float | None = None) -> Spell:
    return Spell(wall, cpu, waited, switches, others)


@pytest.mark.parametrize(
    ("count", "found", "expected"),
    [
        (2, spell(19.8, 0.1), False),  # both have a core each
        (2, spell(5.0, 15.0), True),  # measured: two threads on a machine that others fill
        (2, spell(16.1, 3.9), False),
        (2, spell(15.9, 4.1), True),
        (1, spell(3.3, 6.7), False),  # one thread waits for nobody of ours: nothing to advise
        (2, spell(0.5, 0.4), False),  # it slept: what it waited for is not a core
        (2, spell(5.0, 15.0, wall=WINDOW / 2), False),  # too short to judge
        (2, spell(7.0, None, switches=1000), True),  # no word on waiting: little CPU time, many interruptions
        (2, spell(7.0, None, switches=100), False),  # little CPU time by itself is Python's part of the work
        (2, spell(19.0, None, switches=5000), False),
    ],
)
def test_when_threads_are_crowded(count: int, found: Spell, expected: bool) -> None:
    assert crowded(count, found) is expected


def test_the_remedy_is_what_others_leave() -> None:
    assert "--threads 1 (`threads: 1`" in remedy(2, Machine(2), spell(5.0, 15.0, others=1.0))
    assert "75 % of the time a thread wants a core it has none; other processes keep 1.0 of 2 cores busy" in remedy(
        2, Machine(2), spell(5.0, 15.0, others=1.0)
    )
    assert "--threads 5 (" in remedy(16, Machine(8), spell(5.0, 15.0, others=3.0))
    assert "--threads 4 (" in remedy(8, Machine(8), spell(5.0, 15.0))  # nobody to be seen: half
    assert "interrupted all the time" in remedy(2, Machine(2), spell(5.0, None))


class Counters:
    """Readings of a process whose two threads get a share of their cores' time."""

    def __init__(self, share: float):
        self.share, self.now = share, 0.0

    def __call__(self) -> Reading:
        ran, waited = self.now * self.share, self.now * (1 - self.share)
        return Reading(self.now, 2 * ran, 0, {1: (ran, waited), 2: (ran, waited)}, 2 * self.now)


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counters]:
    counters = Counters(0.4)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: counters.now)
    yield counters


def test_the_watch_warns_once_and_not_before_its_time(crowd: Counters) -> None:
    said: list[str] = []
    watch = ThreadWatch(said.append, lambda: 2, crowd)
    for _ in range(int(4 * WINDOW)):
        crowd.now += 0.99
        watch.check()
        assert len(said) == (crowd.now >= WINDOW)
    assert "2 threads compete for cores (60 % of the time" in said[0] and "`threads: 1`" in said[0]


def test_the_watch_forgets_the_good_time_before(crowd: Counters) -> None:
    """Windows are judged by themselves: an hour alone on the machine does not hide that somebody came."""
    said: list[str] = []
    crowd.share = 1.0
    watch = ThreadWatch(said.append, lambda: 2, crowd)
    for _ in range(360):
        crowd.now += 10.0
        watch.check()
    assert not said
    base = crowd()
    moved = crowd.now + 11.0
    late = Reading(moved, base.cpu + 8.0, 0, {t: (r + 4.0, w + 7.0) for t, (r, w) in base.threads.items()}, None)
    watch._read = lambda: late
    crowd.now = moved
    watch.check()
    assert len(said) == 1


def test_every_stage_of_a_run_is_watched(crowd: Counters) -> None:
    out = io.StringIO()
    progress = make_progress("json", out)
    watched = Watched(progress, ThreadWatch(progress.warn, lambda: 2, crowd))
    watched.note("n")
    watched.warn("w")
    watched.table("t", ["a"], [["b"]])
    with watched.stage("PPO", 3, "rounds", 1) as stage:
        stage.advance(2, loss=1.0)
        crowd.now += 2 * WINDOW
        stage.advance(3)
    lines = out.getvalue().splitlines()
    assert [line.split('"')[3] for line in lines] == ["note", "warn", "table", "stage_start", "advance", "advance", "warn", "stage_end"]
    assert '"total": 3' in lines[3] and '"start": 1' in lines[3] and '"loss": 1.0' in lines[4] and "compete for cores" in lines[6]
