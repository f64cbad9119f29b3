"""A process that torchrun has started with others, before it has met them, or where it has no need to."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from click.testing import CliRunner

from srppo import meeting, watch, world
from srppo.cli import cli
from srppo.config import build, dump
from srppo.errors import ConfigError, SrppoError
from srppo.rollout.vllm_http import Refused
from srppo.run_folder import RunFolder
from srppo.train.checkpoint_state import DamagedCheckpoint
from srppo.train.interrupt import Terminated
from srppo.watch import Watch


def become(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two processes on a machine; nobody is there to be met."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("command", ["config", "report", "lab world"])
def test_what_one_process_does_the_first_does(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", dump(build({}))).close()
    arguments = {"report": [str(tmp_path / "run")], "lab world": ["--output", str(tmp_path / "world")], "config": []}[command]
    said = {}
    for rank in (1, 0):
        become(rank, monkeypatch)
        result = CliRunner().invoke(cli, [*command.split(), *arguments])
        assert result.exit_code == 0, result.output
        said[rank] = result.output
        assert (tmp_path / "world").exists() == (rank == 0 and command == "lab world")
    assert said[0] and not said[1]


@pytest.mark.parametrize("arguments", [["align", "nowhere.yaml"], ["nonsense"]])
def test_an_error_that_all_have_is_said_by_the_first_of_a_machine(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun ends all when one has ended: the others leave it time to speak, and speak if they are left alive."""
    waited: list[float] = []
    monkeypatch.setattr("srppo.cli.time.sleep", waited.append)
    become(0, monkeypatch)
    first = CliRunner().invoke(cli, arguments)
    assert first.exit_code == 2 and first.stderr and not waited
    become(1, monkeypatch)
    other = CliRunner().invoke(cli, arguments)
    assert other.exit_code == 2 and len(waited) == 1 and waited[0] >= 2
    assert other.stderr == first.stderr.replace("srppo: ", "srppo: process 1: ")


@pytest.mark.parametrize(("rank", "said"), [(0, "1 of 2 came within"), (1, "process 0 did not come to 127.0.0.1:1")])
def test_one_whose_others_do_not_come_ends_with_an_error(rank: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEETING", timedelta(seconds=1))
    become(rank, monkeypatch)
    if rank:
        monkeypatch.setenv("MASTER_PORT", "1")  # where nobody listens
    with pytest.raises(ConfigError, match=f"the 2 processes did not find each other: .*{said}"):
        meeting.start_world()
    assert world.world().alone


def test_ctrl_c_ends_the_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    become(0, monkeypatch)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            meeting.start_world()
    finally:
        timer.cancel()


def test_the_end_of_one_of_several_is_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(meeting.os, "_exit", ended.append)
    meeting.end(3)
    assert not ended  # a plain process ends as ever
    monkeypatch.setattr(world, "_WORLD", world.World(1, 2))
    monkeypatch.setattr(meeting.atexit, "_run_exitfuncs", lambda: ended.append(-1))
    meeting.end(3)
    assert ended == [-1, 3]


class Stubborn(SrppoError):
    """One that pickle cannot make anew."""

    exit_code = 3

    def __init__(self, file: str, line: int):
        super().__init__(f"{file}, line {line}")


def test_an_error_arrives_as_it_left() -> None:
    for error in (Refused("no", 400), DamagedCheckpoint(Path("a"), "b")):
        done, found = pickle.loads(pickle.dumps(world._sendable((False, error))))
        assert not done and type(found) is type(error) and str(found) == str(error) and vars(found) == vars(error)


@pytest.mark.parametrize(
    ("error", "kind", "said", "code"),
    [(Stubborn("f", 3), SrppoError, "f, line 3", 3), (ValueError(threading.Lock()), SrppoError, "ValueError: <unlocked", 1)],
)
def test_one_that_cannot_travel_is_said_all_the_same(error: Exception, kind: type[SrppoError], said: str, code: int) -> None:
    _, found = pickle.loads(pickle.dumps(world._sendable((False, error))))
    assert type(found) is kind and str(found).startswith(said) and found.exit_code == code


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Watch]:
    """Makes the watch of one of three processes, all of which are this one."""
    store = dist.HashStore()
    monkeypatch.setattr(watch, "meeting_store", lambda timeout: store)
    monkeypatch.setattr(watch, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return lambda rank: Watch(world.World(rank, 3, rank, 3))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_a_ctrl_c_is_told_of_once(order: tuple[int, ...], watching: Callable[[int], Watch]) -> None:
    """Whoever comes to it first: a process may be in a collective, out of which no signal gets it."""
    errors = [KeyboardInterrupt() for _ in order]
    for rank, error in zip(order, errors):
        watching(rank).failed(error)
    assert [bool(vars(error).get("told")) for error in errors] == [False, True, True]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143), (ConfigError("no"), 2), (ValueError(), 1)])
def test_the_others_end_with_the_code_of_the_first_that_failed(
    error: BaseException, code: int, watching: Callable[[int], Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(watch, "GRACE", 0.01)
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    hanging = watching(1)
    watching(0).failed(error)
    limit = time.monotonic() + 20
    while not ended and time.monotonic() < limit:
        time.sleep(0.01)
    hanging.stop()
    assert ended[0] == code
