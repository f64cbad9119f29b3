"""Several processes do what one does: the same tokens, losses, rewards and weights, spread or not; and they stop and fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from srppo.train.interrupt import Interrupted
from tiny_job import StopAt, metrics, run, tiny_job, weights
from tiny_vllm import FakeServer

HERE = Path(__file__).parent
SMALL: dict[str, Any] = {"sft__micro_batch_tokens": 32, "ppo__micro_batch_tokens": 32}  # several micro-batches a step
LAST = {"guard__keep": "last"}  # the guard would keep the SFT, which shows nothing of PPO
LEAST = {"tuning__critic": "least_squares", "ppo__minibatches": 1, "ppo__epochs": 1}


SHORT = {"diagnose__enabled": False, "guard__every": 0, "ppo__iterations": 2, "evaluation__continued_sft": False}


def launch(jobs: list[dict[str, Any]], folder: Path, processes: int = 2, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Let torchrun's processes do the jobs one after the other."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL", "MASTER", "TORCHELASTIC", "PYTEST"))}
    environment |= {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    command = [*command[:-2], "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(HERE / "parallel_worker.py")]
    return subprocess.run([*command, str(folder / "jobs.json")], capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process (one-*) and of two (two-*)."""
    folder = tmp_path_factory.mktemp("parallel")

    def job(name: str, kind: str, changes: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        return {"folder": str(folder), "kind": kind, "output": str(folder / name), "changes": LAST | (changes or {}), **more}

    for kind in ("full", "lora"):
        run(tiny_job(folder, kind=kind, output=str(folder / f"one-{kind}"), **LAST))
    run(tiny_job(folder, kind="full", output=str(folder / "one-least"), **LAST, **LEAST))
    stopped = tiny_job(folder, kind="full", output=str(folder / "one-then-two"), **LAST)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="PPO round"):
        patch.setattr("srppo.workspace.Interrupt", lambda: StopAt(108))
        run(stopped)
    jobs = [
        job("two-full", "full"),
        job("two-lora", "lora"),
        job("two-full-whole", "full", changes={"parallel__shard_size": 1, **SMALL}),
        job("two-full-small", "full", changes=SMALL),
        job("two-lora-whole", "lora", changes={"parallel__shard_size": 1, **SMALL}),
        job("two-least", "full", changes=LEAST),
        job("one-then-two", "full", resume=True),
        job("two-then-one", "full", stop=34),
        job("two-full", "full", what="run_diagnose", resume=True),
        job("two-lora", "lora", what="run_evaluate"),
    ]
    with FakeServer() as server:
        served = {"rollout__engine": "vllm", "rollout__server": server.url}
        jobs += [job(f"two-served-{kind}", kind, changes=served | SHORT) for kind in ("full", "lora")]
        result = launch(jobs, folder)
        server.shutdown()
    assert result.returncode == 0, result.stderr[-4000:]
    run(tiny_job(folder, kind="full", output=str(folder / "two-then-one"), **LAST), resume=True)
    return folder


def responses(run_folder: Path) -> list[str]:
    """Of PPO's samples that were written down."""
    found = [json.loads(line)["response"] for line in (run_folder / "samples.jsonl").read_text().splitlines()]
    assert len(found) >= 8
    return found


PAIRS = [
    ("one-full", "two-full"),
    ("one-lora", "two-lora"),
    ("one-full", "two-full-whole"),
    ("one-full", "two-full-small"),
    ("one-lora", "two-lora-whole"),
    ("one-least", "two-least"),
    ("one-full", "one-then-two"),
    ("one-full", "two-then-one"),
]
# Rounding alone tells them apart (a first round's KL is all rounding), or they count places and processes.
OTHERWISE = ("timing/", "memory/", "rollout/", "padding", "tokens_per_second", "comm/")


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_the_same_metrics(one: str, two: str, done: Path) -> None:
    for stage in ("sft", "ppo", "sft_continued"):
        ours, theirs = metrics(done / one, stage), metrics(done / two, stage)
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs):
            names = [{n for n in record if not any(part in n for part in OTHERWISE)} for record in (a, b)]
            assert names[0] == names[1]
            for name in names[0]:
                if isinstance(a[name], float):
                    assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-5), (stage, a.get("iteration", a.get("step")), name)


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_the_same_tokens(one: str, two: str, done: Path) -> None:
    for file in sorted((done / one / "evaluation").iterdir()):
        assert file.read_text() == (done / two / "evaluation" / file.name).read_text(), file.name
    assert responses(done / one) == responses(done / two)


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_the_same_weights(one: str, two: str, done: Path) -> None:
    for part in ("sft", "policy", "sft_continued", *(["critic"] if one != "one-least" else [])):
        ours, theirs = weights(done / one / part), weights(done / two / part)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert float((ours[name] - theirs[name]).abs().max()) < 3e-4, (part, name)  # AdamW's first steps go by the gradient's sign


def test_copies_of_two_processes_each(tmp_path: Path) -> None:
    """HSDP: four processes, a copy of the weights between each two, several micro-batches a step."""
    short: dict[str, Any] = {"diagnose__enabled": False, "guard__every": 0, "ppo__iterations": 1, "evaluation__continued_sft": False}
    short |= {"ppo__critic_warmup": 0}
    run(tiny_job(tmp_path, output=str(tmp_path / "one"), **short))
    changes = short | SMALL | {"parallel__shard_size": 2}
    job = {"folder": str(tmp_path), "kind": "full", "output": str(tmp_path / "four"), "changes": changes}
    result = launch([job], tmp_path, processes=4)
    assert result.returncode == 0, result.stderr[-4000:]
    for part in ("sft", "policy", "critic"):
        ours, theirs = weights(tmp_path / "one" / part), weights(tmp_path / "four" / part)
        assert all(float((ours[name] - theirs[name]).abs().max()) < 3e-4 for name in ours)
    norms = [[r["policy/grad_norm"] for r in metrics(tmp_path / name)] for name in ("one", "four")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert responses(tmp_path / "one") == responses(tmp_path / "four")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_vllm_server_is_asked_by_one_of_them(kind: str, done: Path) -> None:
    """Whose answers are those of the weights that the processes hold between them."""
    records = metrics(done / f"two-served-{kind}")
    assert len(records) == 2 and records[1]["rollout/max_abs"] < 1e-4  # in the first the critic alone is trained


def test_evaluating_again_finds_the_same(done: Path) -> None:
    one, two = (json.loads((done / name / "stages/evaluate-srppo.json").read_text()) for name in ("one-lora", "two-lora"))
    assert one["groups"] == two["groups"] and one["heldout_nll"] == pytest.approx(two["heldout_nll"], rel=1e-5)


def test_the_card_is_made_by_all(done: Path) -> None:
    one, two = (json.loads((done / name / "diagnose.json").read_text()) for name in ("one-full", "two-full"))
    assert one["verdict"] == two["verdict"] and one["decision"]["start"] == two["decision"]["start"]


def test_an_error_in_one_process_ends_all(done: Path) -> None:
    """Rank 1 raises while rank 0 goes on to a stage where it waits for rank 1."""
    started = time.monotonic()
    result = launch([{"folder": str(done), "kind": "full", "output": str(done / "broken"), "fail": 1}], done, timeout=120)
    assert result.returncode != 0
    assert "process 1: a file, line 7: this process cannot read it" in result.stderr
    assert "[rank" not in result.stderr, "a traceback of one of ours"
    assert time.monotonic() - started < 100


@pytest.mark.parametrize("stage", ["sft", "update"])
def test_memory_that_runs_out_in_one_process_ends_all(stage: str, done: Path) -> None:
    """In the middle of a step, in which the other waits for it."""
    started = time.monotonic()
    job = {"folder": str(done), "kind": "full", "output": str(done / f"memory-{stage}"), "memory": stage, "changes": SHORT}
    result = launch([job], done, timeout=120)
    assert result.returncode != 0 and "process 1: memory ran out" in result.stderr
    assert "[rank" not in result.stderr, "a traceback of one of ours"
    assert time.monotonic() - started < 100


def test_a_killed_process_ends_all(done: Path) -> None:
    started = time.monotonic()
    result = launch([{"folder": str(done), "kind": "full", "output": str(done / "killed"), "kill": 1}], done, timeout=120)
    assert result.returncode != 0 and "another process of the run is gone" in result.stderr
    assert "[rank" not in result.stderr, "a traceback of one of ours"
    assert time.monotonic() - started < 100
