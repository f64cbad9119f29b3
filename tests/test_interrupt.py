"""Signals: the first asks, the second insists, and nothing is left behind."""

from __future__ import annotations

import os
import signal

import pytest

from srppo.train.interrupt import Interrupt, StopRequested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), number)
        assert interrupt.requested and "Ctrl-C again" in capfd.readouterr().err
        with pytest.raises(StopRequested):
            interrupt.check(3, 4)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
