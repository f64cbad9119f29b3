"""Memory that runs out: the work is cut finer and done again, with the same result, and told; where it cannot be, the error says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from srppo.errors import MemoryRanOut, TrainingStopped
from srppo.memory_limit import MemoryLimits, limits, ran_out
from srppo.models import roles as roles_module
from srppo.models.roles import Roles
from srppo.records import LossOutput, TokenBatch
from srppo.rollout import torch_engine
from srppo.train.learner import Cut, Learner
from tiny_job import metrics, run, tiny_job, weights


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    limits.begin()
    yield
    limits.begin()


def test_what_the_system_says_is_understood() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60)
    assert ran_out(found.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")) and ran_out(MemoryError())
    assert not ran_out(RuntimeError("shapes do not match")) and not ran_out(ValueError("out of memory"))


def test_the_size_is_halved_until_it_fits_and_stays_so() -> None:
    told: list[str] = []
    known, tried = MemoryLimits(), []
    known.begin(told.append)

    def work(size: int) -> int:
        tried.append(size)
        if size > 30:
            raise MemoryError
        return size

    assert known.within("ppo.micro_batch_tokens", 200, 9, work) == 25 and tried == [200, 100, 50, 25]
    assert known.within("ppo.micro_batch_tokens", 200, 9, work) == 25 and tried[4:] == [25]
    assert known.within("ppo.micro_batch_tokens", 10, 9, work) == 10 and known.within("rollout.batch_size", 30, 1, work) == 30
    assert [t.split(";")[0] for t in told] == [f"memory ran out with ppo.micro_batch_tokens {n}" for n in (200, 100, 50)]
    assert known.metrics() == {"memory/halved": 3.0}


def test_what_cannot_be_halved_or_begun_again_is_an_error() -> None:
    def never(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    known = MemoryLimits()
    with pytest.raises(TrainingStopped, match=r"sft.micro_batch_tokens 12, when one row .*out of memory.*srppo plan"):
        known.within("sft.micro_batch_tokens", 50, 20, never)
    known.begin(apart=False)
    with pytest.raises(MemoryRanOut, match=r"one of several processes that share the weights .*lower sft.micro_batch_tokens"):
        known.within("sft.micro_batch_tokens", 50, 20, never)


def test_work_that_no_other_waits_for_begins_anew_wherever_the_weights_are() -> None:
    known = MemoryLimits()
    known.begin(apart=False)

    def work(size: int) -> int:
        if size > 30:
            raise MemoryError
        return size

    assert known.within("rollout.batch_size", 64, 1, work, alone=True) == 16 and known.halved == 2


def test_halvings_of_other_processes_are_told_and_counted() -> None:
    told: list[str] = []
    known = MemoryLimits()
    known.begin(told.append)
    known.hear([["memory ran out here"], ["memory ran out with a"], ["memory ran out with b", "again"]])
    assert told == ["process 1: memory ran out with a", "process 2: memory ran out with b", "process 2: again"]
    assert known.metrics() == {"memory/halved": 3.0} and known.news() == []


def test_another_error_goes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        MemoryLimits().within("x", 8, 1, lambda size: size // 0)


def test_a_step_begun_again_starts_from_zero_gradients() -> None:
    """Memory runs out in the second micro-batch: the first one's gradient must not count twice."""

    def learner() -> Learner:
        return Learner({"w": torch.nn.Parameter(torch.ones(3))}, 0.1, 1e9)

    def losses(made: Learner, size: int, fails: bool) -> Any:
        for start in range(0, 8, size):
            rows = torch.arange(start, min(start + size, 8), dtype=torch.float32)

            def loss(rows: torch.Tensor = rows, start: int = start) -> LossOutput:
                if fails and size > 2 and start:
                    raise MemoryError
                return LossOutput(((made.parameters["w"].sum() - rows) ** 2).sum(), {"rows": torch.tensor(float(len(rows)))})

            yield loss

    limited, plain = learner(), learner()
    result = limited.step(Cut("sft.micro_batch_tokens", 4, 1, lambda size: losses(limited, size, True)), 8)
    expected = plain.step(losses(plain, 2, False), 8)
    assert result == expected and torch.equal(limited.parameters["w"], plain.parameters["w"]) and limits.halved == 1


def test_the_layers_below_are_cut_finer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tuning.lora_layers: the first pass over a rollout, whose states are kept."""
    changes: dict[str, Any] = {"diagnose__enabled": False, "guard__every": 0, "evaluation__continued_sft": False, "ppo__critic_warmup": 0}
    enough, config = (
        tiny_job(tmp_path, kind="lora", output=str(tmp_path / name), tuning__lora_layers=1, ppo__iterations=1, **changes)
        for name in ("enough", "little")
    )
    run(enough)
    states, rows = Roles.prefix_states, []

    def prefix_states(self: Roles, batch: TokenBatch) -> torch.Tensor:
        if len(batch.attention_mask) > 1 and int(batch.attention_mask.sum()) > 60:
            raise torch.OutOfMemoryError("no memory")
        rows.append(len(batch.attention_mask))
        return states(self, batch)

    monkeypatch.setattr(Roles, "prefix_states", prefix_states)
    run(config)
    assert limits.halved >= 3 and sum(rows) >= 8
    one, other = (weights(tmp_path / name / "policy") for name in ("enough", "little"))
    assert all(torch.allclose(one[name], other[name], atol=2e-4) for name in one)


def test_a_whole_run_in_too_little_memory_ends_as_one_in_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scoring and training hold 60 tokens at most, decoding three rows: results differ by rounding alone."""
    changes: dict[str, Any] = {"sft__micro_batch_tokens": 256, "diagnose__enabled": False, "evaluation__continued_sft": False}
    enough, little = (tiny_job(tmp_path, output=str(tmp_path / name), ppo__iterations=2, **changes) for name in ("enough", "little"))
    run(enough)
    scores, values, decode = roles_module.token_scores, roles_module.token_values, torch_engine.decode_refilled

    def full(batch: TokenBatch) -> None:
        if int(batch.attention_mask.sum()) > 60 and len(batch.attention_mask) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")

    def token_scores(model: Any, batch: TokenBatch, **options: Any) -> Any:
        full(batch)
        return scores(model, batch, **options)

    def token_values(trunk: Any, head: Any, batch: TokenBatch, **options: Any) -> Any:
        full(batch)
        return values(trunk, head, batch, **options)

    def decode_refilled(step: Any, ordered: Any, drawn: Any, eos: Any, sampling: Any, width: int, *rest: Any) -> Any:
        if width > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(step, ordered, drawn, eos, sampling, width, *rest)

    monkeypatch.setattr(roles_module, "token_scores", token_scores)
    monkeypatch.setattr(roles_module, "token_values", token_values)
    monkeypatch.setattr(torch_engine, "decode_refilled", decode_refilled)
    run(little)
    told = capsys.readouterr().err
    for key in ("sft.micro_batch_tokens 256; it is 128", "ppo.micro_batch_tokens 2048; it is 1024", "rollout.batch_size 64; it is 32"):
        assert f"memory ran out with {key} from here on" in told
    assert metrics(little.output)[-1]["memory/halved"] >= 8 and "memory/halved" not in metrics(enough.output)[-1]
    for part in ("sft", "policy", "critic"):
        one, other = weights(tmp_path / "enough" / part), weights(tmp_path / "little" / part)
        assert all(torch.allclose(one[name], other[name], atol=2e-4) for name in one)
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("enough", "little")]
    first = [[json.loads(line)["response"] for line in text.splitlines()][:8] for text in texts]
    assert first[0] == first[1]
