"""Signals: the first asks, the second insists, each has its exit code, and nothing is left behind."""

from __future__ import annotations

import os
import signal

import pytest

from srppo.train.interrupt import Interrupt, Interrupted, StopRequested, Terminated
from srppo.world import World

KINDS = [(signal.SIGINT, "Ctrl-C again", KeyboardInterrupt, 130), (signal.SIGTERM, "Another SIGTERM", Terminated, 143)]


@pytest.mark.parametrize(("number", "again", "insisted", "code"), KINDS)
def test_the_first_signal_asks_and_the_second_stops(
    number: signal.Signals, again: str, insisted: type[BaseException], code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        interrupt.check()
        interrupt.poll(3, 4)
        os.kill(os.getpid(), number)
        assert interrupt.requested and f"{again} stops at once" in capfd.readouterr().err
        for ask in (interrupt.check, interrupt.poll):
            with pytest.raises(StopRequested):
                ask()
        with pytest.raises(KeyboardInterrupt) as stop:
            os.kill(os.getpid(), number)
        assert type(stop.value) is insisted
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "code"), [(kind[0], kind[3]) for kind in KINDS])
def test_the_exit_code_is_the_first_signals(number: signal.Signals, code: int) -> None:
    with pytest.raises(Interrupted) as stop, Interrupt():
        os.kill(os.getpid(), number)
        raise Interrupted("saved")
    assert stop.value.exit_code == code


def test_of_several_processes_the_first_of_a_machine_says_what_a_signal_does(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for rank, said in ((0, "Ctrl-C again 10 seconds later stops at once"), (1, "")):
        here = World(rank, 2, rank, 2)
        monkeypatch.setattr("srppo.train.interrupt.world", lambda here=here: here)
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # one Ctrl-C comes twice, from the terminal and from torchrun
            assert interrupt.requested
        err = capfd.readouterr().err
        assert said in err and bool(said) == bool(err)
