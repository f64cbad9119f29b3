"""No test talks to the network: set before any library reads it, also where pytest is started without make. And what several share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from tiny_vllm import FakeServer


def _served() -> Iterator[FakeServer]:
    from tiny_vllm import FakeServer

    with FakeServer() as fake:
        yield fake
        fake.shutdown()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server as vLLM's, for a test."""
    yield from _served()


@pytest.fixture
def other() -> Iterator[FakeServer]:
    """A second one."""
    yield from _served()
