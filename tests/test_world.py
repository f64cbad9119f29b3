"""What processes agree on, and what they take one another's end for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from srppo import meeting, world
from srppo.errors import ConfigError, LostProcess
from srppo.models.weights import sketch


class Beside(world.World):
    """The first of two, the other of which has `theirs`."""

    theirs: Any = None

    def gather(self, item: Any) -> list[Any]:
        return [item, self.theirs]


def test_machines_with_something_else_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Beside(0, 2)
    monkeypatch.setattr(Beside, "theirs", {"configuration": "a", "model (m)": "1"})
    here.check_alike({"configuration": "a", "model (m)": "1"})
    with pytest.raises(ConfigError, match=r"process 1 has another model \(m\) than process 0; .* on all machines"):
        here.check_alike({"configuration": "a", "model (m)": "2"})


def test_a_sketch_tells_models_apart() -> None:
    torch.manual_seed(0)
    one = nn.Linear(300, 7).to(torch.bfloat16)
    other = nn.Linear(300, 7).to(torch.bfloat16)
    assert sketch(one) != sketch(other)
    other.load_state_dict(one.state_dict())
    assert sketch(one) == sketch(other) != sketch(one.float())
    with torch.no_grad():
        other.weight.mul_(1.01)
    assert sketch(other) != sketch(one)


def test_a_process_without_a_gpu_says_so() -> None:
    meeting._check_gpus(1, 2)
    with pytest.raises(ConfigError, match=r"process 2 of this machine has no GPU, as there are 2 .*CUDA_VISIBLE_DEVICES="):
        meeting._check_gpus(2, 2)


class Watching:
    """A watch that has seen `earlier` fail."""

    def __init__(self, earlier: int | None = None):
        self.earlier, self.codes = earlier, list[Any]()

    def failed(self, error: BaseException, exit_code: int | None = None) -> int | None:
        self.codes.append(exit_code)
        return self.earlier


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[BaseException, Any]]:
    """How a run ends in which something is raised, and the exit code that the others are told."""

    def end(error: BaseException, earlier: int | None = None) -> tuple[BaseException, Any]:
        watch = Watching(earlier)
        monkeypatch.setattr(meeting, "_WATCH", watch)
        monkeypatch.setattr(meeting, "start_world", lambda: world.World(0, 2))
        with pytest.raises(BaseException) as found, meeting.world_of_run():
            raise error
        return found.value, watch.codes[0]

    return end


def test_a_process_that_is_gone_is_told_from_a_wrong_setting(ends: Callable[..., tuple[BaseException, Any]]) -> None:
    gone, code = ends(RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234"))
    assert isinstance(gone, LostProcess) and code == 5 and "10.0.0.2" in str(gone)
    wrong = RuntimeError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)")
    assert ends(wrong) == (wrong, None)
    after, _ = ends(RuntimeError("whatever"), earlier=3)
    assert isinstance(after, LostProcess) and "process 3 has failed" in str(after)
