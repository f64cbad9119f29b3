"""The server engine against a small HTTP server that answers like vLLM's, with the torch engine inside. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from srppo.config import build
from srppo.errors import ConfigError, DataError, ModelError
from srppo.rollout.engine import EngineLost, Sampling
from srppo.rollout.vllm_http import ServerError
from srppo.rollout.vllm_make import check_vllm, vllm_engine
from srppo.rollout.vllm_server import VLLMServerEngine
from tiny_models import save_tiny, standard_roles, tiny_model, train_role
from tiny_vllm import PROMPTS, SEEDS, FakeServer, Special, engine_for, expect


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_role_gets_its_own_samples(tmp_path: Path, server: FakeServer, kind: str) -> None:
    roles = standard_roles(save_tiny(tmp_path / "m"), kind)
    engine = engine_for(tmp_path, server)
    train_role(roles, "policy", steps=3)
    said = []
    for role in ("base", "policy", "sft", "policy"):
        with roles.use(role) as model:
            said.append(expect(engine, model).responses.tolist())
    assert said[1] == said[3] and said[0] != said[1] != said[2] != said[0]
    syncs = engine.syncs
    with roles.use("policy") as model:
        expect(engine, model)
    assert engine.syncs == syncs  # nothing changed
    train_role(roles, "policy")
    with roles.use("policy") as model:
        expect(engine, model)
    assert engine.syncs == syncs + 1
    if kind == "lora":
        assert server.loads == 1 and len(server.adapters) == 1  # the weights once, then adapters alone; old ones are gone
    assert server.resets == server.loads
    assert len(list((tmp_path / "shared").glob("*/*"))) == (2 if kind == "lora" else 1)
    engine.close()
    assert not list((tmp_path / "shared").iterdir())


def test_without_adapters_they_are_merged(tmp_path: Path, server: FakeServer) -> None:
    server.lora = False
    roles = standard_roles(save_tiny(tmp_path / "m"), "lora")
    engine = engine_for(tmp_path, server)
    train_role(roles, "policy", steps=3)
    for role in ("policy", "base", "policy"):
        with roles.use(role) as model:
            expect(engine, model)
    train_role(roles, "policy")
    with roles.use("policy") as model:
        expect(engine, model)
    assert not server.adapters and server.loads >= 4


def test_several_servers_share_the_rows(tmp_path: Path, server: FakeServer, other: FakeServer) -> None:
    model, seen = tiny_model("llama", seed=5), []
    engine = engine_for(tmp_path, server, other, rows=1)
    server.delay = other.delay = 0.5  # else one may be through with them while the other still loads its weights
    rollout = engine.generate(model, PROMPTS, SEEDS, Sampling(8), [9] * 12, lambda done, total: seen.append((done, total)))
    assert rollout.prompt_index == [9] * 12
    assert list(dict.fromkeys(s for s in seen if s[0])) == [(i, 12) for i in range(1, 13)]  # and now and then while none comes
    assert server.answered and other.answered and server.answered + other.answered == 12
    assert server.loads == other.loads == 1 and server.version == other.version != "default"
    expect(engine, model)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_restarted_server_gets_the_weights_again(tmp_path: Path, server: FakeServer, kind: str) -> None:
    roles = standard_roles(save_tiny(tmp_path / "m"), kind)
    engine = engine_for(tmp_path, server)
    with roles.use("policy") as model:
        expect(engine, model)
        server.forget()  # between two uses
        expect(engine, model)
        server.failures = [0]  # in the middle of one
        expect(engine, model)
    assert server.loads == 3


def test_a_busy_server_is_asked_again(tmp_path: Path, server: FakeServer) -> None:
    server.failures = [503, 500, 502]
    expect(engine_for(tmp_path, server), tiny_model("llama", seed=5))


def test_what_no_retry_would_change_is_an_error(tmp_path: Path, server: FakeServer) -> None:
    model = tiny_model("llama", seed=5)
    server.failures = [400] * 20
    with pytest.raises(ServerError, match=r"v1/completions answered with status 400: as the test wants it"):
        engine_for(tmp_path, server).generate(model, PROMPTS, SEEDS, Sampling(8))
    server.dev = False
    with pytest.raises(ServerError, match=r"cannot take new weights.*VLLM_SERVER_DEV_MODE=1"):
        engine_for(tmp_path, server).generate(model, PROMPTS, SEEDS, Sampling(8))
    server.dev, server.failures, server.limit = True, [], 12
    with pytest.raises(DataError, match=r"may have 15 tokens, but .* takes 12"):
        engine_for(tmp_path, server).generate(model, PROMPTS, SEEDS, Sampling(8))
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        engine_for(tmp_path, server).generate(model, [[20], []], [0, 1], Sampling(8))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    server.limit, server.failures = 256, []
    with pytest.raises((EngineLost, ModelError)):
        engine_for(tmp_path, server, patience=0.1).generate(model, PROMPTS, SEEDS, Sampling(8))


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    with FakeServer() as fake:
        url = fake.url
        fake.shutdown()
    engine = VLLMServerEngine(Special(), [url], 4, tmp_path, patience=0.4)  # type: ignore[arg-type]
    with pytest.raises(EngineLost, match=r"has not answered for 0.4 s .*Is it running\?.*--resume"):
        engine.generate(tiny_model("llama"), PROMPTS, SEEDS, Sampling(8))


def test_a_stop_leaves_the_rest_unasked(tmp_path: Path, server: FakeServer) -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError("stop")

    engine, model = engine_for(tmp_path, server, rows=1), tiny_model("llama", seed=5)
    with pytest.raises(RuntimeError, match="stop"):
        engine.generate(model, PROMPTS, SEEDS, Sampling(8), on_progress=stop)
    assert server.answered < 6
    expect(engine, model)


def test_nothing_to_do(tmp_path: Path) -> None:
    engine = VLLMServerEngine(Special(), ["http://127.0.0.1:9"], 4, tmp_path)  # type: ignore[arg-type]
    assert engine.generate(tiny_model("llama"), [], [], Sampling(5)).responses.shape == (0, 0)


def test_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**rollout: Any) -> Any:
        return build({"output": str(tmp_path / "run"), "rollout": rollout})

    check_vllm(config())
    monkeypatch.setattr("srppo.rollout.vllm_make.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs vLLM, which is not installed.*make vllm"):
        check_vllm(config(engine="vllm"))
    with pytest.raises(ConfigError, match=r"rollout\.server is set, but rollout\.engine is torch"):
        check_vllm(config(server="http://localhost:8000"))
    with pytest.raises(ConfigError, match="'localhost:8000' is no server's address"):
        check_vllm(config(engine="vllm", server=["http://a:1", "localhost:8000"]))
    served = config(engine="vllm", server=["http://a:1/v1/", "http://b:2"])
    check_vllm(served)  # no vLLM needed here
    for wrong in ("http://a:port", "http://[::1", "ftp://a:1", "http://a:1?x", "http://a b:1", "http://a:1/\r\nX: y", "http://me:pass@a:1"):
        with pytest.raises(ConfigError, match="address"):
            check_vllm(config(engine="vllm", server=wrong))
    engine = vllm_engine(served, Special(), 10, torch.device("cpu"))  # type: ignore[arg-type]
    assert isinstance(engine, VLLMServerEngine) and [s.url for s in engine.servers] == ["http://a:1", "http://b:2"]
    assert engine.handover.place == tmp_path / "run" / "vllm"
    for wrong in ({"rows": 0, "urls": ["http://a:1"]}, {"rows": 1, "urls": []}):
        with pytest.raises(ConfigError, match="rollout"):
            VLLMServerEngine(Special(), folder=tmp_path, **wrong)  # type: ignore[arg-type]
