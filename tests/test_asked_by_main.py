"""What rank 0 shows an engine that lives elsewhere: whole weights of a model that is spread, gathered anew only where they have changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from srppo.models.sharding import Sharding
from srppo.rollout.asked_by_main import AskedByMain, WholeCopy
from srppo.rollout.engine import Sampling
from srppo.rollout.vllm_weights import named_weights
from tiny_models import tiny_model


@pytest.fixture
def sharding(tmp_path: Path) -> Iterator[Sharding]:
    """Of one process: what is spread over it is all there."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield Sharding(init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)), torch.device("cpu"), False)
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_whole_weights_are_shown_and_taken_away(tied: bool, sharding: Sharding) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    real = {n: t.detach().clone() for n, t in model.state_dict().items()}
    sharding.shard(model)
    before = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) for p in before.values())
    with WholeCopy().shown(model):
        shown = named_weights(model)
        assert not any(isinstance(t, DTensor) for t in shown.values()) and shown.keys() <= real.keys()
        assert all(torch.equal(tensor, real[name]) for name, tensor in shown.items())
        if tied:
            assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p is before[n] for n, p in model.named_parameters())


def test_they_are_gathered_anew_where_they_have_changed(sharding: Sharding) -> None:
    model, other = (sharding.shard(tiny_model("llama")) for _ in range(2))
    copy = WholeCopy()

    def shown(what: Any) -> dict[str, torch.Tensor]:
        with copy.shown(what):
            return dict(what.named_parameters())

    first = shown(model)
    assert all(a is b for a, b in zip(first.values(), shown(model).values()))  # the engine sees that nothing has changed
    with torch.no_grad():
        next(model.parameters()).to_local().add_(1)  # type: ignore[attr-defined]
    second = shown(model)
    assert torch.equal(next(iter(second.values())), next(iter(first.values())) + 1)
    assert next(iter(shown(other).values())) is not next(iter(second.values()))


def test_the_engine_meets_whole_weights_even_where_it_fails(sharding: Sharding) -> None:
    model = sharding.shard(tiny_model("llama"))

    class Elsewhere:
        def generate(self, model: Any, *_: Any) -> Any:
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        AskedByMain(Elsewhere()).generate(model, [[1]], [0], Sampling(4))
    assert all(isinstance(p, DTensor) for p in model.parameters())


def test_a_model_that_is_not_spread_is_shown_as_it_is() -> None:
    model = tiny_model("llama")
    before = dict(model.named_parameters())
    with WholeCopy().shown(model):
        assert all(p is before[n] for n, p in model.named_parameters())
