"""The vLLM engine on real vLLM (its CPU build): against plain forward passes, the torch engine, and exact distributions."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

import srppo.rollout.vllm_engine as module
from srppo.errors import ConfigError, DataError, ModelError
from srppo.models.over_rollout import role_logprobs
from srppo.records import Rollout
from srppo.rollout.engine import Sampling, mismatch
from srppo.rollout.torch_engine import TorchEngine
from srppo.rollout.vllm_engine import VLLMEngine
from srppo.rollout.vllm_http import Connection, Gone
from srppo.rollout.vllm_server import VLLMServerEngine
from tiny_job import metrics, run, tiny_job
from tiny_models import save_tiny, standard_roles, tiny_model, train_role

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)")
VOCAB = 48
EOS = (3, 7, 11)
PROMPTS = [[20, 21, 22], [30, 31], [40] * 7, [25]] * 4
SEEDS = list(range(100, 116))


class Special:
    pad_id = 0
    eos_ids = EOS


def small(architecture: str = "llama", **changes: Any) -> Any:
    """With heads of 32, the smallest that vLLM has on a CPU."""
    heads: dict[str, Any] = {"n_head": 1} if architecture == "gpt2" else {"head_dim": 32}
    return tiny_model(architecture, **{"vocabulary": VOCAB, **heads, **changes})


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLMEngine]:
    engine = VLLMEngine(Special(), 64, lora_rank=4, merge=False, max_tokens=64)  # type: ignore[arg-type]
    yield engine
    engine.close()


def assert_plain(model: Any, rollout: Rollout) -> None:
    """Log-probabilities are those of one forward pass over each row by itself; rows end at their first EOS."""
    for row, prompt in enumerate(rollout.prompt_ids):
        ids = rollout.response_ids(row)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(rollout.behaviour_logprobs[row][rollout.mask[row]], expected, atol=1e-4, rtol=0)
        assert not set(ids[:-1]) & set(EOS) and bool(rollout.ended[row]) == (ids[-1] in EOS)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2"])
def test_greedy_is_the_torch_engines_and_logprobs_are_the_models(engine: VLLMEngine, architecture: str) -> None:
    for seed in (1, 2):  # the second time only the weights change
        model = small(architecture, seed=seed)
        greedy = engine.generate(model, PROMPTS, [0] * 16, Sampling(12, greedy=True))
        right = TorchEngine(Special(), 16).generate(model, PROMPTS, [0] * 16, Sampling(12, greedy=True))  # type: ignore[arg-type]
        assert torch.equal(greedy.responses, right.responses) and torch.equal(greedy.ended, right.ended)
        for sampling in (Sampling(12), Sampling(12, temperature=0.7, top_k=9, top_p=0.9)):  # of the model's own distribution
            rollout = engine.generate(model, PROMPTS, SEEDS, sampling)
            assert_plain(model, rollout)
        assert len({tuple(rollout.response_ids(r)) for r in range(16)}) > 8


def test_rows_do_not_depend_on_their_neighbours(engine: VLLMEngine) -> None:
    model = small(seed=1)
    whole = engine.generate(model, PROMPTS, SEEDS, Sampling(16))
    assert 0 < int(whole.ended.sum()) < 16
    for rows in ([5], [9, 2, 14], list(range(15, -1, -1))):
        part = engine.generate(model, [PROMPTS[r] for r in rows], [SEEDS[r] for r in rows], Sampling(16))
        assert [part.response_ids(i) for i in range(len(rows))] == [whole.response_ids(r) for r in rows]
    other = engine.generate(model, PROMPTS, [s + 1 for s in SEEDS], Sampling(16))
    assert sum(other.response_ids(r) != whole.response_ids(r) for r in range(16)) > 8


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, temperature=0.6), Sampling(1, top_k=5)])
def test_frequencies_are_the_models_probabilities(engine: VLLMEngine, sampling: Sampling) -> None:
    model, draws, prompt = small(seed=1), 3000, [20, 30, 40]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / sampling.temperature
    if sampling.top_k:
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    exact = logits.softmax(-1)
    counts = Counter(engine.generate(model, [prompt] * draws, range(draws), sampling).responses[:, 0].tolist())
    assert all(exact[token] > 0 for token in counts)
    common = [t for t in range(VOCAB) if exact[t] * draws >= 5]
    observed, expected = [float(counts[t]) for t in common], [float(exact[t]) * draws for t in common]
    rest = draws - sum(expected)
    if rest > 1e-6:
        observed, expected = [*observed, draws - sum(observed)], [*expected, rest]
    assert len(common) >= 5 and chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_samples_are_of_the_role_and_follow_its_training(engine: VLLMEngine, tmp_path: Path, kind: str) -> None:
    roles = standard_roles(save_tiny(tmp_path / "m", head_dim=32), kind)
    train_role(roles, "policy", steps=2)
    said: dict[str, Any] = {}

    def check(role: str) -> None:
        with roles.use(role) as model:
            rollout = engine.generate(model, PROMPTS, SEEDS, Sampling(8))
        apart = mismatch(rollout.behaviour_logprobs, role_logprobs(roles, role, rollout, 2048), rollout.mask)
        assert apart["max_abs"] < 1e-4, role
        said[role] = rollout.behaviour_logprobs

    for role in ("base", "policy", "sft", "policy"):
        check(role)
    policy, syncs = said["policy"], engine.syncs
    assert not torch.equal(policy, said["sft"]) and not torch.equal(policy, said["base"])
    check("policy")
    assert torch.equal(said["policy"], policy) and engine.syncs == syncs  # nothing changed, nothing handed over
    train_role(roles, "policy")
    check("policy")
    assert not torch.equal(said["policy"], policy) and engine.syncs == syncs + 1
    if kind == "lora":
        assert len(engine._llm.llm_engine.list_loras()) == 1  # old adapters are gone


def test_errors_and_a_stop_leave_it_usable(engine: VLLMEngine) -> None:
    model, seen = small(seed=1), []

    def stop(done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        engine.generate(model, PROMPTS, SEEDS, Sampling(12), on_progress=stop)
    rollout = engine.generate(model, PROMPTS, SEEDS, Sampling(12), [9] * 16, lambda *p: seen.append(p))
    assert_plain(model, rollout)
    assert rollout.prompt_index == [9] * 16 and seen == [(i, 16) for i in range(1, 17)]
    assert engine.generate(model, [], [], Sampling(5)).responses.shape == (0, 0)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        engine.generate(model, [[20], []], [0, 1], Sampling(4))
    with pytest.raises(DataError, match=r"prompt 0 has 510 tokens; with 4 new ones it exceeds the model's 512 positions"):
        engine.generate(model, [[20] * 510], [0], Sampling(4))
    for other in (model, small(seed=2)):  # longer than foreseen: started again. Whole blocks are cached, and must not outlive the weights
        assert_plain(other, engine.generate(other, [[20] * 300], [0], Sampling(4)))
    broken = small(seed=1)
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        engine.generate(broken, PROMPTS, SEEDS, Sampling(4))
    assert_plain(model, engine.generate(model, PROMPTS, SEEDS, Sampling(4)))


def test_nothing_around_it_changes(engine: VLLMEngine) -> None:
    model = small(seed=1).train()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = torch.random.get_rng_state(), random.getstate(), torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype()
    rollout = engine.generate(model, PROMPTS, SEEDS, Sampling(6))
    assert torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype()) == before[2:] and torch.is_grad_enabled()
    assert model.training and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    for tensor in (rollout.responses, rollout.mask, rollout.behaviour_logprobs, rollout.ended):
        assert not tensor.is_inference() and not tensor.requires_grad and tensor.device.type == "cpu"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_whole_job(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[VLLMEngine] = []
    original = VLLMEngine.__init__
    monkeypatch.setattr(module.VLLMEngine, "__init__", lambda self, *a, **k: (made.append(self), original(self, *a, **k))[1])
    save_tiny(tmp_path / "llama", "llama", head_dim=32)
    config = tiny_job(tmp_path, kind=kind, rollout__engine="vllm", rollout__batch_size=16)
    try:
        run(config)
    finally:
        for engine in made:
            engine.close()
    rounds = metrics(tmp_path / "run")
    assert len(made) == 1 and len(rounds) == 3 and made[0].syncs > 3
    # after the round in which only the critic learns: each sampled from the weights it then trained
    assert all(r["rollout/max_abs"] < 1e-4 for r in rounds[1:])
    assert rounds[-1]["objective/kl_sft"] != rounds[0]["objective/kl_sft"]


def test_a_real_server(tmp_path: Path) -> None:
    """Weights and adapters are handed to a server that is never restarted."""
    roles = {kind: standard_roles(save_tiny(tmp_path / kind, head_dim=32, seed=len(kind)), kind) for kind in ("full", "lora")}
    port = 20000 + os.getpid() % 20000
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", save_tiny(tmp_path / "served", head_dim=32, seed=9)]
    command += ["--port", str(port), "--generation-config", "vllm", "--enable-lora", "--max-lora-rank", "8", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 26)]
    switches = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"} | switches
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, tmp_path / "log")
        engine = VLLMServerEngine(Special(), [url], 8, tmp_path / "shared")  # type: ignore[arg-type]
        for kind in ("full", "lora"):
            for turn, role in enumerate(("base", "sft", "policy", "policy")):
                if turn == 3:
                    train_role(roles[kind], "policy")
                with roles[kind].use(role) as model:
                    rollout = engine.generate(model, PROMPTS, SEEDS, Sampling(8))
                apart = mismatch(rollout.behaviour_logprobs, role_logprobs(roles[kind], role, rollout, 2048), rollout.mask)
                assert apart["max_abs"] < 1e-4, (kind, role, turn)
        assert engine._lora  # by adapters, not merged
        whole = [rollout.response_ids(r) for r in range(16)]
        with roles["lora"].use("policy") as model:
            few = engine.generate(model, PROMPTS[:3], SEEDS[:3], Sampling(8))
        assert [few.response_ids(r) for r in range(3)] == whole[:3]
        engine.close()
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    line, until = Connection(url), time.monotonic() + 300
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            line.ask("/v1/models", timeout=5)
            return
        except Gone:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_in_distributed_training_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"rollout\.server"):
        module.import_vllm()
