"""A small HTTP server that answers like vLLM's, with the torch engine inside, and faults to be switched on. Needs no vLLM."""

from __future__ import annotations

import copy
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from srppo.models.tokens import SpecialTokens
from srppo.records import Rollout
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from srppo.rollout.vllm_server import VLLMServerEngine
from tiny_models import tiny_model

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
        self.failures: list[int | bytes] = []  # the next answers to completions: a status, a body, 0 to be restarted
        self.broken: dict[str, bytes] = {}  # what a path is answered with
        self.delay = 0.0  # seconds before a completion
        self.poison: list[int] | None = None  # a prompt that is never answered
        self.answered, self.loads, self.resets = 0, 0, 0
        self.guard = threading.Lock()
        self.blank: Any = tiny_model("llama", seed=99)  # made here: transformers' loading is not for several threads at once
        self.forget()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def forget(self) -> None:
        """What a restart does: nothing loaded is left, and all connections are cut."""
        self.model = copy.deepcopy(self.blank)
        self.version, self.adapters = "default", dict[str, Any]()
        self.life = getattr(self, "life", 0) + 1  # last: who sees the new one sees all of it

    def die(self) -> None:
        """Gone for good: nothing listens at its address any more."""
        self.life += 1
        self.shutdown()
        self.server_close()

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
        text = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        server = self.server
        if self.cut():
            return
        if self.path in server.broken:
            self.answer(200, server.broken[self.path])
        elif self.path == "/v1/models":
            own = {"id": "base", "parent": None, "max_model_len": server.limit}
            self.answer(200, {"data": [own, *({"id": name, "parent": "base"} for name in server.adapters)]})
        elif self.path == "/weight_info" and server.dev:
            self.answer(200, {"weight_version": server.version})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            time.sleep(server.delay)
        with server.guard:
            if self.cut():
                return
            match self.path:
                case path if path in server.broken:
                    self.answer(200, server.broken[path])
                case "/v1/completions":
                    self.complete(body)
                case "/collective_rpc":
                    assert body["method"] == "reload_weights"
                    model = copy.deepcopy(server.blank)
                    model.load_state_dict(load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors"))
                    server.model = model
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
            elif isinstance(status, bytes):
                self.answer(200, status)
            else:
                self.answer(status, {"error": {"message": "as the test wants it"}})
            return
        if body["prompt"] == server.poison:
            self.answer(500, {"error": {"message": "poison"}})
            return
        assert body["logprobs"] == 0 and body["return_token_ids"] and body["ignore_eos"] and body["stop_token_ids"]
        if body["model"] != "base" and body["model"] not in server.adapters:
            self.answer(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        model = server.model
        if body["model"] != "base":
            model = merged(model, server.adapters[body["model"]])
        sampling = Sampling(body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"])
        special = SpecialTokens(0, tuple(body["stop_token_ids"]))
        rollout = TorchEngine(special, 4).generate(model, [body["prompt"]], [body["seed"]], sampling)
        scores = rollout.behaviour_logprobs[0].tolist()
        server.answered += 1
        self.answer(200, {"choices": [{"token_ids": rollout.response_ids(0), "logprobs": {"token_logprobs": scores}}]})


def merged(model: Any, folder: str) -> Any:
    """A copy with an adapter's W + B A; srppo writes the scale into B."""
    out, tensors = copy.deepcopy(model), load_file(Path(folder) / "adapter_model.safetensors")
    for name in {n.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for n in tensors}:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        with torch.no_grad():
            out.get_submodule(name).weight += b @ a
    return out


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
