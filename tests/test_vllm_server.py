"""The server engine against a small HTTP server that answers like vLLM's, with the torch engine inside. Needs no vLLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from srppo.config import build
from srppo.errors import ConfigError, DataError, ModelError
from srppo.records import Rollout
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from srppo.rollout.vllm_http import ServerError
from srppo.rollout.vllm_make import check_vllm, vllm_engine
from srppo.rollout.vllm_server import VLLMServerEngine
from tiny_models import save_tiny, standard_roles, tiny_model, train_role

PROMPTS = [[20, 21, 22], [30, 31], [40] * 7, [50]] * 3
SEEDS = list(range(100, 112))


class Special:
    pad_id = 0
    eos_ids = (3, 7, 11)


class FakeServer(ThreadingHTTPServer):
    """Serves what it was last told to load. Faults are switched on by the tests."""

    daemon_threads = True

    def __init__(self, lora: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lora, self.dev, self.limit = lora, True, 256
        self.failures: list[int] = []  # statuses of the next answers to completions; 0 hangs up
        self.answered, self.loads, self.resets = 0, 0, 0
        self.guard = threading.Lock()
        self.forget()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def forget(self) -> None:
        """What a restart does: nothing loaded is left, and all connections are cut."""
        self.model: Any = tiny_model("llama", seed=99)
        self.version, self.adapters = "default", dict[str, Any]()
        self.life = getattr(self, "life", 0) + 1  # last: who sees the new one sees all of it

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients may hang up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def setup(self) -> None:
        super().setup()
        self.life = self.server.life

    def cut(self) -> bool:
        """Whether the server was restarted since this connection was made."""
        if self.life == self.server.life:
            return False
        self.close_connection = True
        self.connection.close()
        return True

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = None) -> None:
        text = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        server = self.server
        if self.cut():
            return
        if self.path == "/v1/models":
            own = {"id": "base", "parent": None, "max_model_len": server.limit}
            self.answer(200, {"data": [own, *({"id": name, "parent": "base"} for name in server.adapters)]})
        elif self.path == "/weight_info" and server.dev:
            self.answer(200, {"weight_version": server.version})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.guard:
            if self.cut():
                return
            match self.path:
                case "/v1/completions":
                    self.complete(body)
                case "/collective_rpc":
                    assert body["method"] == "reload_weights"
                    server.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
                    server.loads += 1
                    self.answer(200, {"results": [None]})
                case "/reset_prefix_cache":
                    server.resets += 1
                    self.answer(200, {"success": True})
                case "/update_weight_version":
                    server.version = body["new_version"]
                    self.answer(200, {})
                case "/v1/load_lora_adapter" if server.lora:
                    server.adapters[body["lora_name"]] = body["lora_path"]
                    self.answer(200)
                case "/v1/unload_lora_adapter" if server.lora:
                    known = server.adapters.pop(body["lora_name"], None)
                    self.answer(200 if known else 404, None if known else {"error": {"message": "The lora adapter cannot be found."}})
                case _:
                    self.answer(404, {"detail": "Not Found"})

    def complete(self, body: dict[str, Any]) -> None:
        server = self.server
        if server.failures:
            status = server.failures.pop(0)
            if status == 0:
                server.forget()
                self.cut()
            else:
                self.answer(status, {"error": {"message": "as the test wants it"}})
            return
        assert body["logprobs"] == 0 and body["return_token_ids"] and body["ignore_eos"] and body["stop_token_ids"] == [3, 7, 11]
        if body["model"] != "base" and body["model"] not in server.adapters:
            self.answer(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        model = server.model
        if body["model"] != "base":
            plain = {n: t.clone() for n, t in model.state_dict().items()}
            model = PeftModel.from_pretrained(model, server.adapters[body["model"]]).merge_and_unload()
            server.model = tiny_model("llama")
            server.model.load_state_dict(plain)
        sampling = Sampling(body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"])
        rollout = TorchEngine(Special(), 4).generate(model, [body["prompt"]], [body["seed"]], sampling)  # type: ignore[arg-type]
        scores = rollout.behaviour_logprobs[0].tolist()
        server.answered += 1
        self.answer(200, {"choices": [{"token_ids": rollout.response_ids(0), "logprobs": {"token_logprobs": scores}}]})


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake
        fake.shutdown()


@pytest.fixture
def other() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake
        fake.shutdown()


def engine_for(tmp_path: Path, *servers: FakeServer, patience: float = 5.0, rows: int = 4) -> VLLMServerEngine:
    return VLLMServerEngine(Special(), [s.url for s in servers], rows, tmp_path / "shared", patience)  # type: ignore[arg-type]


def expect(engine: VLLMServerEngine, model: Any) -> Rollout:
    """What the torch engine says of the same rows, for the model as it is now."""
    rollout = engine.generate(model, PROMPTS, SEEDS, Sampling(8))
    right = TorchEngine(Special(), 16).generate(model, PROMPTS, SEEDS, Sampling(8))  # type: ignore[arg-type]
    assert torch.equal(rollout.responses, right.responses) and torch.equal(rollout.mask, right.mask)
    assert torch.equal(rollout.ended, right.ended)
    torch.testing.assert_close(rollout.behaviour_logprobs, right.behaviour_logprobs, atol=1e-4, rtol=0)
    return rollout


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
    engine = engine_for(tmp_path, server, other)
    rollout = engine.generate(model, PROMPTS, SEEDS, Sampling(8), [9] * 12, lambda done, total: seen.append((done, total)))
    assert rollout.prompt_index == [9] * 12 and seen == [(i, 12) for i in range(1, 13)]
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
    with pytest.raises((ServerError, ModelError)):
        engine_for(tmp_path, server, patience=0.1).generate(model, PROMPTS, SEEDS, Sampling(8))


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    with FakeServer() as fake:
        url = fake.url
        fake.shutdown()
    engine = VLLMServerEngine(Special(), [url], 4, tmp_path, patience=0.4)  # type: ignore[arg-type]
    with pytest.raises(ServerError, match=r"has not answered for 0.4 s .*Is it running\?.*--resume"):
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
    engine = vllm_engine(served, Special(), 10, torch.device("cpu"))  # type: ignore[arg-type]
    assert isinstance(engine, VLLMServerEngine) and [s.url for s in engine.servers] == ["http://a:1", "http://b:2"]
    assert engine._place == tmp_path / "run" / "vllm"
    for wrong in ({"rows": 0, "urls": ["http://a:1"]}, {"rows": 1, "urls": []}):
        with pytest.raises(ConfigError, match="rollout"):
            VLLMServerEngine(Special(), folder=tmp_path, **wrong)  # type: ignore[arg-type]
