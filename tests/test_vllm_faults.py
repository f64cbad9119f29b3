"""vLLM servers that die, hang, answer nonsense or forget their weights in the middle of a round. Needs no vLLM."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from srppo.errors import ConfigError
from srppo.rollout.engine import EngineLost, Sampling
from srppo.rollout.torch_engine import TorchEngine
from srppo.rollout.vllm_deal import Answered, Deal, GivenUp, Said, pause_after
from srppo.rollout.vllm_http import Connection, Gone, ServerError
from srppo.rollout.vllm_server import VLLMServerEngine
from tiny_job import metrics, run, tiny_job, weights, without_clock
from tiny_models import save_tiny, standard_roles, tiny_model, train_role
from tiny_vllm import PROMPTS, SEEDS, FakeServer, Special, engine_for, expect

# --- one server of several is gone


def test_the_rows_of_a_dead_server_go_to_the_other(tmp_path: Path, server: FakeServer, other: FakeServer) -> None:
    said: list[str] = []
    engine = engine_for(tmp_path, server, other, patience=60.0)
    engine.warn = said.append
    model = tiny_model("llama", seed=5)

    def kill(done: int, _: int) -> None:
        if done == 3 and server.life < 100:
            server.die()
            server.life = 100

    rollout = engine.generate(model, PROMPTS, SEEDS, Sampling(8), on_progress=kill)
    right = TorchEngine(Special(), 16).generate(model, PROMPTS, SEEDS, Sampling(8))  # type: ignore[arg-type]
    assert torch.equal(rollout.responses, right.responses) and torch.equal(rollout.mask, right.mask)
    assert any(server.url in text and "its rows go to the others" in text for text in said), said
    expect(engine, model)  # the next round does not wait for it either


def test_a_server_that_was_never_there(tmp_path: Path, server: FakeServer) -> None:
    with FakeServer() as fake:
        dead = fake.url
        fake.shutdown()
    engine = VLLMServerEngine(Special(), [dead, server.url], 4, tmp_path / "shared", patience=60.0)  # type: ignore[arg-type]
    began = time.monotonic()
    expect(engine, tiny_model("llama", seed=5))
    assert server.answered == 12 and time.monotonic() - began < 30  # not after the patience is over


# --- the only one is gone, for a while or for good


def test_a_server_that_comes_back_goes_on(tmp_path: Path, server: FakeServer) -> None:
    said: list[str] = []
    engine = engine_for(tmp_path, server, patience=60.0)
    engine.warn = said.append
    server.failures = [503] * 9
    expect(engine, tiny_model("llama", seed=5))
    assert sum("does not answer (status 503" in text for text in said) >= 1 and any("is back after" in text for text in said)


def test_answers_that_are_too_slow_do_not_hold_up_a_stop(tmp_path: Path, server: FakeServer) -> None:
    server.delay = 20.0

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop  # called although nothing is done yet

    began = time.monotonic()
    with pytest.raises(Stop):
        engine_for(tmp_path, server).generate(tiny_model("llama", seed=5), PROMPTS, SEEDS, Sampling(8), on_progress=stop)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    "body",
    [
        b"<html>502 from a proxy</html>",
        b"[]",
        b"null",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"token_ids": ["a"], "logprobs": {"token_logprobs": [0]}}]}',
        b'{"choices": [{"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0]}}]}',
        b'{"choices": [{"token_ids": [], "logprobs": {"token_logprobs": []}}]}',
        b'{"choices": [{"token_ids": [5], "logprobs": []}]}',
        json.dumps({"choices": [{"token_ids": [5] * 9, "logprobs": {"token_logprobs": [-1.0] * 9}}]}).encode(),
        b'{"choices": [{"token_ids": [1e99], "logprobs": {"token_logprobs": ["x"]}}]}',
        b'{"choices": [{"token_ids": [-1], "logprobs": {"token_logprobs": [-1.0]}}]}',
        b"[" * 100_000,
    ],
)
def test_nonsense_is_asked_again(tmp_path: Path, server: FakeServer, body: bytes) -> None:
    server.failures = [body] * 2
    expect(engine_for(tmp_path, server, patience=60.0), tiny_model("llama", seed=5))


@pytest.mark.parametrize("path", ["/v1/models", "/weight_info", "/collective_rpc", "/v1/completions"])
def test_nonsense_for_ever_ends_in_words(tmp_path: Path, server: FakeServer, path: str) -> None:
    server.broken[path] = b"\xff<html>\x1b]0;gotcha\x07</html>"
    with pytest.raises((EngineLost, ServerError), match=r"no JSON|without") as caught:
        engine_for(tmp_path, server, patience=0.3, rows=2).generate(tiny_model("llama", seed=5), PROMPTS[:2], SEEDS[:2], Sampling(8))
    assert "\x1b" not in str(caught.value)


def test_a_redirection_is_not_followed(tmp_path: Path, server: FakeServer, other: FakeServer) -> None:
    server.failures = [302] * 30
    with pytest.raises(ServerError, match="status 302"):
        engine_for(tmp_path, server).generate(tiny_model("llama", seed=5), PROMPTS, SEEDS, Sampling(8))
    assert other.answered == 0


def test_one_prompt_that_no_server_answers(tmp_path: Path, server: FakeServer, other: FakeServer) -> None:
    """Others are answered meanwhile, so the servers are well: the row itself is given up after its patience."""
    model = tiny_model("llama", seed=5)
    for fake in (server, other):
        fake.poison = [40] * 7
    with pytest.raises(EngineLost, match=r"a prompt got no answer in \d+ tries \(status 500: poison\)"):
        engine_for(tmp_path, server, other, patience=0.5).generate(model, PROMPTS, SEEDS, Sampling(8))


# --- weights are lost


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_restart_in_the_middle_of_a_round_on_one_of_two(tmp_path: Path, server: FakeServer, other: FakeServer, kind: str) -> None:
    roles = standard_roles(save_tiny(tmp_path / "m"), kind)
    train_role(roles, "policy", steps=3)
    engine = engine_for(tmp_path, server, other, patience=60.0)
    with roles.use("policy") as model:
        expect(engine, model)
        server.failures = [0]
        server.forget()
        expect(engine, model)
        other.forget()
        expect(engine, model)
    assert server.version == other.version != "default" and server.loads >= 2 and other.loads == 2


def test_a_server_restarted_without_adapters_gets_them_merged(tmp_path: Path, server: FakeServer) -> None:
    roles = standard_roles(save_tiny(tmp_path / "m"), "lora")
    train_role(roles, "policy", steps=3)
    engine = engine_for(tmp_path, server)
    with roles.use("policy") as model:
        expect(engine, model)
        assert server.adapters
        server.lora = False
        server.forget()
        expect(engine, model)
    assert not server.adapters


def test_a_load_that_is_cut_off_leaves_no_false_claim(tmp_path: Path, server: FakeServer) -> None:
    """The server has taken new weights, but nobody could tell it their name: asked for the old ones again it must not say it has them."""
    engine, first, second = engine_for(tmp_path, server, patience=0.2), tiny_model("llama", seed=5), tiny_model("llama", seed=6)
    expect(engine, first)
    server.broken["/reset_prefix_cache"] = b"<html>cut off</html>"
    with pytest.raises(EngineLost):
        engine.generate(second, PROMPTS, SEEDS, Sampling(8))
    server.broken.clear()
    assert server.version.endswith("-unfinished")
    expect(engine, first)


def test_a_connection_that_was_hung_up_asks_nothing_more(server: FakeServer) -> None:
    line = Connection(server.url)
    line.ask("/v1/models")
    line.hang_up()
    with pytest.raises(Gone, match="hung up"):
        line.ask("/update_weight_version", {"new_version": "late"})
    assert server.version == "default"


# --- a run


def test_a_run_whose_server_dies_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third round: the state of the second is saved, and the resumed run ends as an undisturbed one."""
    monkeypatch.setattr("srppo.rollout.vllm_make.PATIENCE", 0.3)

    def job(name: str, fake: FakeServer) -> Any:
        changes = {"ppo__checkpoint_every": 100, "evaluation__continued_sft": False, "guard__every": 0, "diagnose__on_no_go": "warn"}
        changes |= {"diagnose__samples": 2, "rollout__shared_folder": str(tmp_path / "shared")}
        return tiny_job(tmp_path, output=str(tmp_path / name), rollout__engine="vllm", rollout__server=fake.url, **changes)

    with FakeServer() as whole:
        run(job("whole", whole))
        whole.shutdown()
    with FakeServer() as dying:
        watch = threading.Thread(target=die_in_round, args=(dying, tmp_path / "cut", 3), daemon=True)
        watch.start()
        with pytest.raises(EngineLost, match=r"PPO stopped after round 2 of 3: .*has not answered for 0\.3 s.*--resume") as caught:
            run(job("cut", dying))
        assert caught.value.exit_code == 3
        watch.join()
    assert sorted(p.name for p in (tmp_path / "cut/checkpoints/ppo").iterdir()) == ["checkpoint-2"]
    with FakeServer() as new:
        run(job("cut", new), resume=True)
        new.shutdown()
    assert without_clock(metrics(tmp_path / "cut")) == without_clock(metrics(tmp_path / "whole"))
    ours, right = weights(tmp_path / "cut/policy"), weights(tmp_path / "whole/policy")
    assert ours.keys() == right.keys() and all(torch.equal(ours[k], right[k]) for k in right)


def die_in_round(server: FakeServer, folder: Path, number: int) -> None:
    """Kill the server when the round before is in the log."""
    while True:
        lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
        if any(f'"iteration": {number - 1}' in line for line in lines):
            server.die()
            return
        time.sleep(0.005)


# --- the dealing itself, on a clock of the test's


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pauses_grow_to_a_limit() -> None:
    assert [pause_after(n) for n in (1, 2, 3, 6, 7, 8, 10**6)] == [0.25, 0.5, 1.0, 8.0, 15.0, 15.0, 15.0]


def test_patience_begins_anew_with_every_answer() -> None:
    clock = Clock()
    deal = Deal(3, 1, patience=10.0, clock=clock)
    assert [deal.take(), deal.take(), deal.take()] == [0, 1, 2]
    deal.fails("a", "x")
    clock.now = 9.0
    deal.fails("a", "x")
    deal.answer("a", 0, [5], [-1.0])
    clock.now = 18.0
    deal.fails("a", "x")
    clock.now = 27.9
    deal.fails("a", "x")
    clock.now = 28.0
    with pytest.raises(GivenUp, match="a has not answered for 10 s"):
        deal.fails("a", "x")
    events = [deal.next(0) for _ in range(4)]
    assert [type(e) for e in events] == [Said, Answered, Said, type(None)] and events[1] == Answered(0, [5], [-1.0])
    assert "is back after 9.0 s" in events[2].text  # type: ignore[union-attr]
    clock.now = 60.0
    deal.works("a")  # nobody was told that it failed again
    assert deal.next(0) is None


def test_one_of_two_may_fail_for_ever() -> None:
    clock = Clock()
    deal = Deal(2, 2, patience=10.0, clock=clock)
    for second in range(0, 1000, 5):
        clock.now = float(second)
        deal.fails("a", "x")
    deal.fails("b", "x")
    clock.now += 9.0
    deal.fails("b", "x")
    clock.now += 2.0
    with pytest.raises(GivenUp):
        deal.fails("a", "x")


def test_a_row_is_given_up_after_tries_and_time() -> None:
    clock = Clock()
    deal = Deal(1, 1, patience=10.0, clock=clock)
    for _ in range(6):  # often, but in no time
        assert deal.take() == 0
        deal.hand_back(0, "x")
    clock.now = 10.0
    assert deal.take() == 0
    with pytest.raises(GivenUp, match="no answer in 7 tries"):
        deal.hand_back(0, "x")


def test_waiting_threads_are_let_go(server: FakeServer) -> None:
    deal = Deal(1, 1, patience=10.0)
    assert deal.take() == 0
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(deal.take()))
    thread.start()
    deal.answer("a", 0, [5], [-1.0])
    thread.join(10)
    assert found == [None]


# --- the key


def test_a_key_that_is_no_header(tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a\r\nX-Evil: 1")
    with pytest.raises(ConfigError, match="VLLM_API_KEY holds characters"):
        engine_for(tmp_path, server).generate(tiny_model("llama", seed=5), PROMPTS, SEEDS, Sampling(8))


def test_connections_are_watched_by_the_kernel(server: FakeServer) -> None:
    line = Connection(server.url)
    line.ask("/v1/models")
    sock = line._http.sock
    assert sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    line.close()
    assert not line.open
