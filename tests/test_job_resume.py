"""Runs that are stopped and go on: to the same weights, metrics and summary, whatever they were stopped in."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from srppo import stages as stages_module
from srppo.errors import ConfigError
from srppo.train import continued as continued_module
from srppo.train import ppo as ppo_module
from srppo.train.interrupt import Interrupt, Interrupted, StopRequested
from tiny_job import StopAt, metrics, run, tiny_job, weights, without_clock


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_stopped_run_resumes_exactly(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"reward__kl_target": 0.5}
    if kind == "lora":  # dropout draws anew, and the broken run's checkpoints are written by a thread
        changes["tuning__lora_dropout"] = 0.2
    whole = tiny_job(tmp_path, "llama", kind, output=str(tmp_path / "whole"), **changes)
    run(whole)
    broken = tiny_job(tmp_path, "llama", kind, output=str(tmp_path / "broken"), background_checkpoints=kind == "lora", **changes)
    stops = 0
    for at in (8, 25, 40):  # in SFT, in a rollout, in a later round
        monkeypatch.setattr("srppo.workspace.Interrupt", lambda at=at: StopAt(at))
        try:
            run(broken, resume=stops > 0)
        except Interrupted as stop:
            assert stop.exit_code == 130 and "--resume" in str(stop)
            stops += 1
    monkeypatch.setattr("srppo.workspace.Interrupt", Interrupt)
    run(broken, resume=True)
    assert stops >= 2
    for part in ("sft", "policy", "critic"):
        one, other = weights(tmp_path / "whole" / part), weights(tmp_path / "broken" / part)
        assert all(torch.equal(one[name], other[name]) for name in one)
    for stage in ("sft", "ppo"):
        assert without_clock(metrics(whole.output, stage)) == without_clock(metrics(broken.output, stage))
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken"))
    assert one["srppo"] == other["srppo"] and one["compute"] == other["compute"]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("heldout", [4, 0])
def test_stopped_continued_sft_resumes_exactly(kind: str, heldout: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With held-out demonstrations the best state so far is saved too; without, the last one is what counts."""
    changes: dict[str, Any] = {"data__heldout": heldout, "sft__learning_rate": 1e-3, "diagnose__enabled": False, "guard__every": 0}
    whole, broken = (tiny_job(tmp_path, "llama", kind, output=str(tmp_path / name), **changes) for name in ("whole", "broken"))
    run(whole)
    inner = continued_module.train_supervised
    for at in (3, 4):

        def stopping(*args: Any, at: int = at, **options: Any) -> None:
            inner(*args, **(options | {"interrupt": StopAt(at)}))

        monkeypatch.setattr(continued_module, "train_supervised", stopping)
        with pytest.raises(Interrupted, match=r"stopped after step \d of \d+ of continued SFT"):
            run(broken, resume=(tmp_path / "broken").exists())
    monkeypatch.setattr(continued_module, "train_supervised", inner)
    run(broken, resume=True)
    one, other = (weights(tmp_path / name / "sft_continued") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert without_clock(metrics(whole.output, "sft_continued")) == without_clock(metrics(broken.output, "sft_continued"))
    ends = [json.loads((tmp_path / name / "stages/sft_continued.json").read_text()) for name in ("whole", "broken")]
    assert {k: v for k, v in ends[0].items() if k != "seconds"} == {k: v for k, v in ends[1].items() if k != "seconds"}
    assert ends[0]["trained_steps"] > 5 and not (tmp_path / "broken/checkpoints/sft_continued").exists()


def test_a_finished_run_resumes_to_the_same_summary(tmp_path: Path) -> None:
    config = tiny_job(tmp_path)
    first = run(config)
    again = run(config, resume=True)
    assert {k: v for k, v in first.items() if k in ("base", "sft", "srppo", "sft_continued")} == {
        k: v for k, v in again.items() if k in ("base", "sft", "srppo", "sft_continued")
    }


def test_a_stop_while_scoring_counts_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = (tiny_job(tmp_path, output=str(tmp_path / name)) for name in ("whole", "broken"))
    first = run(whole)
    inner, calls = ppo_module.score, []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise StopRequested
        return inner(*args)

    monkeypatch.setattr(ppo_module, "score", stopping)
    with pytest.raises(Interrupted):
        run(broken)
    assert run(broken, resume=True)["compute"] == first["compute"]


def test_critic_free_runs_resume_exactly_and_write_no_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = (tiny_job(tmp_path, output=str(tmp_path / name), ppo__baseline="group") for name in ("whole", "broken"))
    run(whole)
    monkeypatch.setattr("srppo.workspace.Interrupt", lambda: StopAt(25))
    with pytest.raises(Interrupted):
        run(broken)
    monkeypatch.setattr("srppo.workspace.Interrupt", Interrupt)
    run(broken, resume=True)
    one, other = (weights(tmp_path / name / "policy") for name in ("whole", "broken"))
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert not (tmp_path / "whole/critic").exists() and "loss/value_avg" not in metrics(whole.output)[-1]
    with pytest.raises(ConfigError, match="samples_per_prompt"):
        tiny_job(tmp_path, ppo__baseline="group", ppo__samples_per_prompt=1)


class Over(Exception):
    """The test has seen enough."""


def test_a_process_that_is_killed_counts_for_all_but_its_last_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the run cost is noted while a stage goes on, and the next process adds to it."""
    config, file = tiny_job(tmp_path, diagnose__enabled=False), tmp_path / "run/elapsed.json"
    monkeypatch.setattr("srppo.workspace.NOTED_EVERY", 0.01)
    noted: list[dict[str, Any]] = []

    def look(*_: Any, **__: Any) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            noted.append(json.loads(file.read_text()) if file.exists() else {})
            if noted[-1].get("stages", {}).get("sft", {}).get("seconds", 0) > (0 if len(before) == 0 else before[-1]):
                break
            time.sleep(0.01)
        raise Over

    monkeypatch.setattr(stages_module, "train_sft", look)
    before: list[float] = []
    for resume in (False, True):
        with pytest.raises(Over):
            run(config, resume=resume)
        cost = noted[-1]
        assert cost["stages"]["sft"]["seconds"] > 0 and cost["seconds"] >= cost["stages"]["sft"]["seconds"]
        before.append(json.loads(file.read_text())["stages"]["sft"]["seconds"])
    assert before[1] > before[0]
