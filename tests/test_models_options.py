"""Options that change time and memory but no result: compiled layers, frozen models off the device, freed memory kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from srppo.allocator import give_back, keep_freed_memory
from srppo.errors import ConfigError
from srppo.models.compiled import compiles_adapters
from srppo.models.full_roles import FullRoles
from srppo.models.offload import Offloaded
from srppo.models.over_rollout import role_logprobs
from srppo.models.roles import Roles
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from tiny_models import save_tiny, standard_roles, tiny_batch, train_role


def learned(made: Roles) -> list[torch.Tensor]:
    """Log-probabilities and values, and the gradients of their weighted sums."""
    out = []
    for value, parameters in (
        (made.score("policy", tiny_batch(), train=True).logprobs, made.parameters("policy")),
        (made.values(tiny_batch(), train=True), made.critic_parameters()),
    ):
        (value * torch.linspace(-1, 2, len(value))).sum().backward()
        out += [value.detach(), *(p.grad.clone() for p in parameters.values() if p.grad is not None)]
    return out


def test_compiled_layers_that_overlook_adapters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.11.0+cu130")
    with pytest.raises(
        ConfigError, match=r"model.compile with tuning.kind lora needs torch 2.13.*this is 2.11.0\+cu130.*model.compile: false"
    ):
        standard_roles(save_tiny(tmp_path), "lora", compile=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.skipif(not compiles_adapters(), reason="an older torch"))])
def test_compiled_layers_learn_the_same_and_decode_plainly(kind: str, tmp_path: Path) -> None:
    plain, compiled = (standard_roles(save_tiny(tmp_path / name), kind, compile=name == "compiled") for name in ("plain", "compiled"))
    for a, b in zip(learned(plain), learned(compiled), strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-3)
    frames = torch._dynamo.utils.counters["frames"]["total"]
    assert frames > 0
    said = []
    for made in (plain, compiled):
        with made.use("policy") as model:
            said.append(TorchEngine(made.special, 4).generate(model, [[8, 9, 10]] * 4, [1, 2, 3, 4], Sampling(6)))
    assert torch.equal(said[0].responses, said[1].responses)
    assert torch._dynamo.utils.counters["frames"]["total"] == frames  # nothing was compiled for decoding


def test_an_offloaded_model_is_itself_while_it_visits() -> None:
    """The device is another one in real use; here a visit makes copies of its own, and leaving puts the same host tensors back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False)).requires_grad_(False)
    model[1].weight = nn.Parameter(model[0].weight.t().contiguous(), requires_grad=False)
    before, x = {n: p.clone() for n, p in model.named_parameters()}, torch.ones(2, 3)
    expected = model(x)
    away = Offloaded(model, torch.device("cpu"))
    home = {n: p.data_ptr() for n, p in model.named_parameters()}
    with away.visiting():
        assert all(p.data_ptr() != home[n] for n, p in model.named_parameters()) and torch.equal(model(x), expected)
        with away.visiting():
            pass
        assert all(p.data_ptr() != home[n] for n, p in model.named_parameters())  # the inner use does not end the outer one
    with pytest.raises(RuntimeError, match="stop"), away.visiting():
        raise RuntimeError("stop")
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == home
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and torch.equal(model(x), expected)


def test_freed_memory_is_kept_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not keep_freed_memory()
    monkeypatch.setattr("sys.platform", "darwin")
    assert not keep_freed_memory() and not give_back()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux")
def test_what_is_kept_can_be_given_back() -> None:
    """In a process of its own: 200 blocks of 1 MB between ones that stay, freed, then given back."""
    program = """
        from pathlib import Path
        import torch
        from srppo.allocator import give_back, keep_freed_memory
        held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
        print(keep_freed_memory(), end=" ")
        blocks = [(torch.ones(250_000), torch.ones(10)) for _ in range(200)]
        small = [b for _, b in blocks]
        del blocks
        before = held()
        print(give_back(), before - held() > 150)
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=clean)
    assert done.stdout.split() in (["True"] * 3, ["False"] * 3), done.stderr  # musl has none of it


def test_offloaded_roles_say_what_they_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full tuning with a store that offloads, though the device is the CPU: scores, copies and training are those without."""
    monkeypatch.setattr("srppo.models.roles.FullRoles", partial(_offloading, FullRoles))
    away = standard_roles(save_tiny(tmp_path / "a"), "full", frozen_dtype="bfloat16")
    monkeypatch.undo()
    here = standard_roles(save_tiny(tmp_path / "b"), "full", frozen_dtype="bfloat16")
    for role in ("base", "sft", "policy"):
        assert torch.equal(away.score(role, tiny_batch()).logprobs, here.score(role, tiny_batch()).logprobs)
    for made in (away, here):
        train_role(made, "policy")
        made.create("again", "base")
    assert away.fingerprint("policy") == here.fingerprint("policy") and away.fingerprint("again") == here.fingerprint("again")
    visits = []
    monkeypatch.setattr(Offloaded, "_leave", lambda self, leave=Offloaded._leave: (visits.append(1), leave(self))[1])
    with away.use("sft") as model:
        rollout = TorchEngine(away.special, 8).generate(model, [[5, 6], [7], [8, 9, 10]], range(3), Sampling(6))
    visits.clear()
    role_logprobs(away, "sft", rollout, 1)
    assert visits == [1]  # three micro-batches
    assert set(away._store._away) == {"base", "sft"}  # type: ignore[attr-defined]


def _offloading(made: Any, *args: Any) -> Any:
    return made(*args[:4], True, *args[5:])
