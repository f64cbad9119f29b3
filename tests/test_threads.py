"""Threads: the configuration's word, then the environment's, then what the machine has free."""

from __future__ import annotations

import pytest

from srppo.threads import choose_threads


def test_configuration_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(2, 8, 0.0)[0] == 2
    count, reason = choose_threads(16, 8, 0.0)
    assert count == 16 and "more threads than cores" in reason


def test_environment_comes_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(None, 8, 0.0) == (3, "threads: 3, from OMP_NUM_THREADS")


def test_a_busy_machine_gets_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert choose_threads(None, 8, 0.2)[0] == 8
    assert choose_threads(None, 8, 5.1)[0] == 3
    count, reason = choose_threads(None, 2, 9.0)
    assert count == 1 and "busy" in reason
