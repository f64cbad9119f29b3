"""What a process sends, counted: by the rings' closed forms, each collective once, and torch.distributed left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from srppo.profiling.traffic import KINDS, Traffic, counted, sent


@pytest.fixture
def four() -> Iterator[None]:
    """Four processes pretended in this one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def test_rings() -> None:
    assert (sent("all-gather", 10, 4), sent("reduce-scatter", 10, 4)) == (30, 30)  # parts of 10 to each of the others
    assert (sent("all-reduce", 40, 4), sent("broadcast", 40, 4)) == (60, 40)
    assert sent("all-gather", 10, 1) == sent("all-reduce", 40, 1) == 0


@pytest.mark.usefixtures("four")
def test_each_collective_is_counted_once() -> None:
    own, whole = torch.ones(10), torch.ones(40)
    with counted(Traffic()) as traffic:
        dist.all_reduce(whole)
        dist.all_gather([torch.empty(10) for _ in range(4)], own)
        dist.broadcast(whole, src=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in torch 2.13 an old name of all_gather_single, which it calls
            dist.all_gather_into_tensor(whole, own)
            dist.reduce_scatter_tensor(own, whole)
        distributed_c10d.all_reduce(whole)
    assert dict(traffic.bytes) == {"all-reduce": 2 * 240, "all-gather": 2 * 120, "broadcast": 160, "reduce-scatter": 120}
    assert dict(traffic.calls) == {"all-reduce": 2, "all-gather": 2, "broadcast": 1, "reduce-scatter": 1}
    taken = traffic.take()
    assert taken["comm/bytes"] == 1000 and taken["comm/calls"] == 6 and taken["timing/comm"] > 0
    assert set(traffic.take().values()) == {0.0}


@pytest.mark.usefixtures("four")
def test_afterwards_nothing_is_counted_and_all_is_as_before() -> None:
    before = {name: getattr(dist, name) for name in KINDS if hasattr(dist, name)}
    with pytest.raises(RuntimeError, match="inside"), counted(Traffic()) as traffic:
        raise RuntimeError("inside")
    assert all(getattr(dist, name) is function for name, function in before.items())
    dist.all_reduce(torch.ones(10))
    assert not traffic.calls
