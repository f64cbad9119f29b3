"""Seconds, memory and traces: measured where they are spent, and never in the way of a run."""

from __future__ import annotations

import gzip
import json
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from srppo.errors import TrainingStopped
from srppo.profiling import phases as phases_module
from srppo.profiling import trace as trace_module
from srppo.profiling.ledger import Ledger
from srppo.profiling.memory import MIB, CudaPeak, KernelPeak, Peaks, SampledPeak, WholePeak, of_device, resident
from srppo.profiling.phases import Phases
from srppo.profiling.trace import traced
from srppo.records import LossOutput
from srppo.train.compute import Compute
from srppo.train.speed import TimedLearner, padding_share, rates, snapshot
from tiny_job import metrics, run, tiny_job

FAST: dict[str, Any] = {"diagnose__enabled": False, "evaluation__continued_sft": False, "sft__steps": 2}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
ROOT = Path(__file__).resolve().parents[1]


# --- memory


class Tank:
    """Memory in use is what the test says; the peak since the last reset is kept as the kernel keeps it."""

    def __init__(self) -> None:
        self.level = self.top = 10.0

    def to(self, level: float) -> None:
        self.level, self.top = level, max(self.top, level)

    def peak(self) -> dict[str, float]:
        return {"": self.top, "_reserved": self.top + 1}

    def reset(self) -> None:
        self.top = self.level


def test_spells_inside_one_another_have_their_own_peaks() -> None:
    tank = Tank()
    peaks = Peaks(tank)
    tank.to(90)
    tank.to(20)
    with peaks.spell() as outer:
        tank.to(50)
        tank.to(20)
        with peaks.spell() as first:
            tank.to(40)
            tank.to(15)
        with peaks.spell() as second:
            tank.to(60)
            tank.to(30)
        tank.to(5)
    assert (outer[""], first[""], second[""]) == (60, 40, 60)
    assert first["_reserved"] == 41
    with peaks.spell() as low:
        pass
    assert low[""] == 5 and peaks.so_far()[""] == 90


def test_a_spell_that_fails_is_closed() -> None:
    tank = Tank()
    peaks = Peaks(tank)
    with peaks.spell() as outer:
        with pytest.raises(ZeroDivisionError), peaks.spell() as inner:
            tank.to(70)
            raise ZeroDivisionError
        tank.to(60)
    assert (inner[""], outer[""]) == (70, 70)


def block(size: int) -> None:
    """Use so many bytes of memory for a moment."""
    with mmap.mmap(-1, size) as memory:
        for i in range(0, size, mmap.PAGESIZE):
            memory[i] = 1


@LINUX
@pytest.mark.parametrize("source", [KernelPeak, SampledPeak])
def test_the_peak_of_a_spell_on_this_machine(source: Any) -> None:
    if source is KernelPeak and not KernelPeak().works():
        pytest.skip("this kernel does not reset its peak")
    peaks, size = Peaks(source()), 96 * MIB
    with peaks.spell() as empty:
        pass
    with peaks.spell() as full:
        if source is KernelPeak:
            block(size)
        else:
            with mmap.mmap(-1, size) as memory:
                for i in range(0, size, mmap.PAGESIZE):
                    memory[i] = 1
                peaks._source.peak()  # the sampling thread would look within a twentieth of a second
    with peaks.spell() as after:
        pass
    assert full[""] - empty[""] == pytest.approx(96, abs=8)
    assert abs(after[""] - empty[""]) < 8 and peaks.so_far()[""] >= full[""]


@LINUX
def test_resetting_does_not_hide_the_runs_peak() -> None:
    """What getrusage says falls with a reset; so_far remembers."""
    before = resident().so_far()[""]
    with resident().spell():
        block(64 * MIB)
    with resident().spell():
        pass
    now = WholePeak().peak()[""]
    assert resident().so_far()[""] >= max(now, before)
    assert resident().so_far()[""] >= 64


def test_the_peak_before_the_first_look_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the kernel resets is found by trying, and trying resets."""
    monkeypatch.setattr(WholePeak, "peak", lambda _: {"": 5e6})
    assert resident.__wrapped__().so_far()[""] == 5e6


@LINUX
def test_a_kernel_that_does_not_reset_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n")
    kernel = KernelPeak(tmp_path)
    assert kernel.peak() == {"": 2.0}
    assert not kernel.works()  # the file takes the 5, and nothing changes
    assert not KernelPeak(tmp_path / "none").works()


def test_a_gpu_is_measured_by_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 3 * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda d: 5 * MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    device = torch.device("cuda", 1)
    with Peaks(CudaPeak(device)).spell() as found:
        pass
    assert found == {"": 3.0, "_reserved": 5.0} and set(calls) == {device}
    assert of_device(torch.device("cpu")) is resident()


# --- phases and stages


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    ticking = Clock()
    monkeypatch.setattr(phases_module.time, "perf_counter", ticking)
    yield ticking


def test_phases_add_up_and_are_taken_once(clock: Clock) -> None:
    phases = Phases(torch.device("cpu"))
    for seconds in (2.0, 3.0):
        with phases("rollout"):
            clock.now += seconds
        clock.now += 100.0  # between the phases
    with phases("update"):
        clock.now += 4.0
    assert phases.seconds("rollout") == 5.0 and phases.seconds("none") == 0.0
    found = phases.take()
    assert found["timing/rollout"] == 5.0 and found["timing/update"] == 4.0
    assert found["memory/rollout"] > 10 and found["timing/cpu"] >= 0
    with phases("score"):
        clock.now += 1.0
    again = phases.take()
    assert {name for name in again if name.startswith("memory/")} == {"memory/score"} and again["timing/score"] == 1.0


def test_a_gpu_is_waited_for_at_the_end_of_a_phase_only(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that a phase has queued belongs to it."""
    waits: list[float] = []

    def synchronize(device: torch.device) -> None:
        waits.append(clock.now)
        clock.now += 7.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(phases_module, "of_device", lambda _: Peaks(Tank()))
    phases = Phases(torch.device("cuda", 0))
    with phases("update"):
        clock.now += 1.0
    assert waits == [1.0] and phases.seconds("update") == 8.0
    with pytest.raises(ZeroDivisionError), phases("score"):
        raise ZeroDivisionError
    assert len(waits) == 1  # a GPU that failed may never answer


def test_the_ledger_goes_on_where_an_earlier_process_stopped() -> None:
    ledger = Ledger(
        {"sft": {"seconds": 10.0, "peak_rss_mb": 9e9}, "ppo": {"seconds": None, "peak_rss_mb": 1.0}, "x": 3, "y": {"seconds": 1}}
    )
    assert list(ledger.stages) == ["sft"]
    with ledger.stage("sft"), ledger.stage("inner"):
        pass
    with pytest.raises(ZeroDivisionError), ledger.stage("ppo"):
        raise ZeroDivisionError
    assert 10.0 <= ledger.stages["sft"]["seconds"] < 20.0 and ledger.stages["sft"]["peak_rss_mb"] == 9e9
    assert ledger.stages["ppo"]["peak_rss_mb"] > 10
    assert Ledger("damaged").stages == {} and Ledger(None).stages == {}
    both = Ledger({"sft": {"seconds": 1.0, "peak_rss_mb": 5.0}})
    both.add(Ledger({"sft": {"seconds": 2.0, "peak_rss_mb": 3.0}}))
    assert both.stages == {"sft": {"seconds": 3.0, "peak_rss_mb": 5.0}}


# --- rates


def test_rates_of_a_round() -> None:
    """600 response tokens in 2 + 3 + 5 s; scoring passed 900 tokens more than the rollouts, the update 2000; 800 positions were padding."""
    collected, spent = Compute(300, 0), Compute(1200, 2000)
    seconds = {"rollout": 2.0, "score": 3.0, "update": 5.0}
    found = rates(600, seconds, collected, spent)
    found.pop("padding_share", None)
    assert found == {
        "tokens_per_second": 60.0,
        "rollout/tokens_per_second": 300.0,
        "score/tokens_per_second": 300.0,
        "update/tokens_per_second": 400.0,
    }
    spent.padding_tokens = 800  # type: ignore[attr-defined]
    assert rates(600, seconds, collected, spent)["padding_share"] == pytest.approx(0.2)
    assert padding_share(None, 10) is None and padding_share(0, 0) == 0.0
    copy = snapshot(spent)
    copy.forward_tokens += 1
    assert (copy.forward_tokens, spent.forward_tokens, copy.trained_tokens) == (1201, 1200, 2000)


def test_a_timed_learner_learns_as_one_without_a_clock() -> None:
    from srppo.train.learner import Learner

    results = []
    for kind in (Learner, TimedLearner):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        learner = kind({"w": weight}, 0.1, 1.0)
        result = learner.step((lambda w=weight: LossOutput((w**2).sum(), {}),), 2)  # type: ignore[misc]
        results.append((weight.detach().clone(), result.loss))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert isinstance(learner, TimedLearner)
    taken = learner.take_seconds()
    assert taken > 0 and learner.take_seconds() == 0.0


# --- the trace


def test_a_trace_and_its_table_are_written(tmp_path: Path) -> None:
    warned: list[str] = []
    with traced(tmp_path / "profile", "round-2", warned.append), Phases(torch.device("cpu"))("rollout"):
        torch.randn(8, 8) @ torch.randn(8, 8)
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == ["round-2.json.gz", "round-2.txt"] and not warned
    with gzip.open(tmp_path / "profile/round-2.json.gz") as stream:
        names = {event.get("name") for event in json.load(stream)["traceEvents"]}
    assert {"aten::mm", "srppo/rollout"} <= names
    assert "aten::mm" in (tmp_path / "profile/round-2.txt").read_text()


def test_a_profiler_that_fails_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        at = "start"

        def __init__(self, **_: Any) -> None:
            pass

        def start(self) -> None:
            if self.at == "start":
                raise RuntimeError("no Kineto")

        def stop(self) -> None:
            raise RuntimeError("lost it")

    monkeypatch.setattr(trace_module.torch.profiler, "profile", Broken)
    warned: list[str] = []
    done = []
    for at in ("start", "stop"):
        monkeypatch.setattr(Broken, "at", at)
        with traced(tmp_path / "profile", "round-2", warned.append):
            done.append(at)
    assert done == ["start", "stop"]
    assert "no Kineto" in warned[0] and "lost it" in warned[1]


def test_a_disk_that_fails_stops_nothing_and_what_fails_inside_is_told(tmp_path: Path) -> None:
    warned: list[str] = []
    (tmp_path / "profile").write_text("a file is in the way")
    with traced(tmp_path / "profile", "round-2", warned.append):
        pass
    assert len(warned) == 1 and "could not be written" in warned[0]
    with pytest.raises(TrainingStopped), traced(tmp_path / "other", "round-2", warned.append):
        raise TrainingStopped("stop")
    assert not (tmp_path / "other").exists() and len(warned) == 1


# --- in a run


def test_a_run_measures_itself(tmp_path: Path) -> None:
    """Every name that is logged is defined in docs/metrics.md; the second round is the one profiled."""
    config = tiny_job(tmp_path, profile=True, evaluation__every=1, guard__every=2, ppo__checkpoint_every=1, **FAST)
    run(config)
    records = metrics(config.output)
    assert len(records) == 3
    for k, record in enumerate(records, 1):
        timing = {name: record[f"timing/{name}"] for name in ("rollout", "score", "update", "policy", "critic")}
        assert all(seconds > 0 for name, seconds in timing.items() if name != "policy" or k > 1)  # round 1 warms the critic up
        assert timing["policy"] + timing["critic"] <= timing["update"]
        assert ("timing/evaluate" in record) is (k < 3) and ("timing/guard" in record) is (k > 1)  # round 2, and the last
        assert ("timing/checkpoint" in record) is (k > 1)  # that of the round before
        assert ("timing/profiled" in record) is (k == 2)
        assert record["memory/update"] > 50
    assert {p.name for p in (Path(config.output) / "profile").iterdir()} == {"round-2.json.gz", "round-2.txt"}
    steps = metrics(config.output, "sft")
    assert all(r["timing/step"] > 0 and 0 <= r["padding_share"] < 1 for r in steps)
    costs = json.loads((Path(config.output) / "elapsed.json").read_text())
    assert set(costs["stages"]) == {"load", "evaluate", "sft", "ppo", "report"}
    assert costs["peak_rss_mb"] >= max(cost["peak_rss_mb"] for cost in costs["stages"].values()) - 1
    assert sum(cost["seconds"] for cost in costs["stages"].values()) <= costs["seconds"]

    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    defined = set(re.findall(r"`([a-z_]+(?:/[a-z0-9_]+)?)`", page))
    logged = {name for record in (*records, *steps) for name in record} - {"stage", "iteration", "step"}
    assert {name for name in logged if not name.startswith("eval/")} <= defined


@pytest.mark.parametrize(("rounds", "profile", "expected"), [(1, True, ["round-1"]), (3, True, ["round-2"]), (3, False, [])])
def test_the_round_that_is_profiled(
    rounds: int, profile: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second; of a run of one round that one."""
    taken: list[str] = []

    def noted(folder: Path, name: str, warn: object) -> nullcontext[None]:
        assert folder == tmp_path / "run/profile"
        taken.append(name)
        return nullcontext()

    monkeypatch.setattr("srppo.train.ppo.traced", noted)
    run(tiny_job(tmp_path, ppo__iterations=rounds, guard__every=0, profile=profile, **FAST))
    assert taken == expected
