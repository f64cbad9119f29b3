"""The reward card of a run that is resumed: PPO once begun is not refused, what the card chose stays its choice, and damage is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import srppo.workspace
from srppo.config import RunConfig, build, merge
from srppo.errors import RunFolderError
from srppo.job import align, run_diagnose, run_sft
from srppo.progress import make_progress
from srppo.train.interrupt import Interrupted
from tiny_job import StopAt, tiny_job

QUIET: dict[str, Any] = {"progress": make_progress("quiet")}
SMALL: dict[str, Any] = {
    "diagnose__samples": 2,
    "diagnose__prompts": 2,
    "diagnose__betas": [1.0, 2.0],
    "diagnose__preview": False,
    "guard__every": 0,
    "evaluation__continued_sft": False,
    "evaluation__max_prompts": 1,
    "evaluation__samples": 1,
    "ppo__iterations": 2,
}


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    return build(merge(config.model_dump(), {k.replace("__", "."): v for k, v in changes.items()}))


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srppo.diagnose.inquiry.judge_reward", lambda card: ("no-go", ["It would do harm."]))


def stop_in_ppo(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after PPO's first round."""
    started: list[StopAt] = []
    from srppo.train import ppo

    finished = ppo.update

    def update(*args: Any, **kwargs: Any) -> Any:
        metrics = finished(*args, **kwargs)
        started[0].left = 0
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(srppo.workspace, "Interrupt", lambda: started.append(StopAt(float("inf"))) or started[0])
        patch.setattr(ppo, "update", update)
        with pytest.raises(Interrupted, match="after PPO round 1"):
            align(config, **QUIET)


def stage(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "run/stages/diagnose.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_ppo_begun_against_a_no_go_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag that overruled the card need not be given again."""
    refuse(monkeypatch)
    config = tiny_job(tmp_path, **SMALL)
    stop_in_ppo(changed(config, diagnose__on_no_go="warn"), monkeypatch)
    assert align(config, resume=True, **QUIET)["srppo"]


def test_no_card_is_made_in_the_middle_of_ppo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    config = tiny_job(tmp_path, **SMALL)
    stop_in_ppo(changed(config, diagnose__enabled=False), monkeypatch)
    assert align(config, resume=True, **QUIET)["srppo"]
    assert not (tmp_path / "run/diagnose.json").exists()


def test_a_card_that_is_turned_off_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    config = tiny_job(tmp_path, **SMALL)
    run_diagnose(config, **QUIET)
    assert align(changed(config, diagnose__enabled=False), resume=True, **QUIET)["srppo"]


def test_after_ppo_the_cards_choice_is_still_called_that(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, diagnose__on_no_go="warn", sft__keep="last", **SMALL)
    align(config, **QUIET)
    used = json.loads((tmp_path / "run/stages/diagnose.json").read_text())["decision"]
    assert used["automatic"] == ["reward.checkpoint", "reward.kl_coef"]
    card = run_diagnose(config, resume=True, **QUIET)
    assert card["decision"]["automatic"] == used["automatic"] and card["decision"]["beta"] == used["beta"]
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("(the card&#39;s choice)") == 2 and page.count("(set in the recipe)") == 1
    assert "the recipe's beta" not in " ".join(card["reasons"])


def test_the_summary_names_the_checkpoint_that_the_card_moved_to(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, diagnose__on_no_go="warn", **SMALL)
    run_diagnose(config, **QUIET)
    stage(tmp_path, lambda content: content["decision"].update(start="share-0.5", numerator="share-0.5"))
    training = align(config, resume=True, **QUIET)["sft_training"]
    assert (training["kept"]["share"], training["kept"]["folder"]) == (0.5, "sft_checkpoints/share-0.5")
    assert [c["share"] for c in training["checkpoints"]] == [0.5, 1.0]


@pytest.mark.parametrize("content", ["{}", "[]", '{"verdict": "go", "reasons": [], "decision": {"start": "share-1"}}'])
def test_a_damaged_outcome_is_told(content: str, tmp_path: Path) -> None:
    config = tiny_job(tmp_path, **SMALL)
    run_sft(config, **QUIET)
    (tmp_path / "run/stages/diagnose.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"diagnose\.json: damaged .*delete it, and --resume makes"):
        align(config, resume=True, **QUIET)


@pytest.mark.parametrize(("damage", "words"), [("gone", "own checkpoint is gone"), ("cut", "own checkpoint is damaged")])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_lost_checkpoint_is_told_before_anything_is_deleted(damage: str, words: str, kind: str, tmp_path: Path) -> None:
    config = tiny_job(tmp_path, kind=kind, diagnose__on_no_go="warn", **SMALL)
    run_sft(config, **QUIET)
    half = tmp_path / "run/sft_checkpoints/share-0.5"
    decision = {"start": "share-0.5", "numerator": "share-0.5", "beta": 1.0, "automatic": ["sft.keep", "reward.checkpoint"]}
    (tmp_path / "run/stages/diagnose.json").write_text(json.dumps({"verdict": "go", "reasons": ["x"], "decision": decision}))
    if damage == "gone":
        shutil.rmtree(half)
    else:
        for file in half.glob("*.safetensors"):
            file.write_bytes(b"abc")
    kept = sorted(p.relative_to(tmp_path) for p in (tmp_path / "run/stages").iterdir())
    assert Path("run/stages/evaluate-sft.json") in kept
    for _ in range(2):
        with pytest.raises(RunFolderError, match=rf"share-0\.5: this run's {words}.*put it back"):
            align(config, resume=True, **QUIET)
    assert sorted(p.relative_to(tmp_path) for p in (tmp_path / "run/stages").iterdir()) == kept
    (tmp_path / "run/stages/diagnose.json").unlink()
    with pytest.raises(RunFolderError, match=rf"share-0\.5: this run's {words}"):
        run_diagnose(config, resume=True, **QUIET)


def test_a_path_as_numerator_beside_a_finished_sft_without_ppo(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, **SMALL)
    run_sft(config, **QUIET)
    sft = str(tmp_path / "run/sft")
    other = {"output": str(tmp_path / "other"), "sft__checkpoint": sft, "reward__checkpoint": sft, "ppo__iterations": 0}
    card = run_diagnose(changed(config, **other), **QUIET)
    assert (card["decision"]["start"], card["decision"]["numerator"]) == ("sft", "reward")
