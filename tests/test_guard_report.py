"""What the guard did, wherever it is told: the policy's model card, the report, the summary; and weights that were lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from srppo.card import model_card
from srppo.config import build
from srppo.job import align
from srppo.progress import make_progress
from srppo.report.record import Record
from srppo.report.words import findings
from srppo.train import guard as guard_module
from srppo.train.guard import Guard, Look
from tiny_job import tiny_job

SMALL: dict[str, Any] = {
    "diagnose__enabled": False,
    "evaluation__continued_sft": False,
    "evaluation__max_prompts": 1,
    "evaluation__samples": 1,
    "guard__every": 1,
    "guard__samples": 1,
    "guard__patience": 2,
    "ppo__iterations": 4,
}


def peak_at(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Make a round the best of all."""
    monkeypatch.setattr(guard_module, "criterion", lambda look: -abs(look.round - best))


def test_the_policys_card_and_the_report_say_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak_at(monkeypatch, 1)
    summary = align(tiny_job(tmp_path, **SMALL), progress=make_progress("quiet"))
    assert summary["ppo_training"]["rounds"] == 3 and summary["ppo_training"]["kept_round"] == 1
    card = (tmp_path / "run/policy/README.md").read_text()
    assert "- PPO: 3 rounds (of 4 planned; the guard stopped it) of 6 x 2 rollouts" in card
    assert "these are the weights after round 1, the best by the guard's measure" in card
    assert "coefficient 1.0" in card and "auto" not in card
    page = (tmp_path / "run/report.html").read_text()
    assert "the guard ended PPO after round 3 of 4 and kept the policy of round 1, the best." in page


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"rounds": 6}, "- PPO: 6 rounds of"),
        ({"rounds": 6, "kept_round": 6}, "- PPO: 6 rounds of"),
        ({"rounds": 1, "kept_round": 0}, "1 round (of 6 planned; the guard stopped it) of"),
        ({"rounds": 6, "kept_round": 0}, "no round was better than the SFT model, so these are the SFT model's weights"),
    ],
)
def test_rounds_of_the_policys_card(trained: dict[str, Any], words: str) -> None:
    card = model_card(build({"model": {"name": "m"}, "ppo": {"iterations": 6}}), "policy", {"first_beta": 0.7, **trained})
    assert words in card and "coefficient 0.7\n" in card
    assert ("these are" in card) == (trained.get("kept_round") == 0)


@pytest.mark.parametrize(("checkpoint", "words"), [("sft", ""), (0.5, " (pi_sft after 50 % of the SFT)"), ("a/b", " (pi_sft from `a/b`)")])
def test_the_rewards_numerator(checkpoint: Any, words: str) -> None:
    config = build({"model": {"name": "m"}, "reward": {"checkpoint": checkpoint}, "sft": {"checkpoints_at": [0.5, 1.0]}})
    assert f"- reward: log pi_sft - log pi_base{words}, placement" in model_card(config, "policy", {"rounds": 1})


def test_an_anchor_that_is_none_has_no_coefficient() -> None:
    assert "- no KL anchor\n" in model_card(build({"model": {"name": "m"}, "reward": {"kl_anchor": "none"}}), "policy", {"rounds": 1})


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"rounds": 6, "kept_round": 6, "stopped_early": False}, None),
        ({"rounds": 6, "kept_round": 4, "stopped_early": False}, "the guard kept the policy of round 4, the best."),
        ({"rounds": 3, "kept_round": 3, "stopped_early": True}, "the guard ended PPO after round 3 of 6."),
        (
            {"rounds": 3, "kept_round": 0, "stopped_early": True},
            "the guard ended PPO after round 3 of 6 and went back to the SFT model: no round was better",
        ),
        ({"rounds": 6, "kept_round": 6, "stopped_early": False, "kept_lost": 2}, "an earlier round's policy, whose weights were lost"),
        ({"rounds": None, "kept_round": "x"}, None),
        ("damaged", None),
    ],
)
def test_the_report_says_in_words_what_the_guard_did(training: Any, words: str | None) -> None:
    config = {"ppo": {"iterations": 6}}
    said = " ".join(findings(Record(Path("run"), config, "", {}, {}, {"ppo_training": training}, [], [], {}, {}, [])))
    assert "guard" not in said if words is None else words in said


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_lost_weights_leave_the_last_rounds(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on resume there is nothing else to keep, so it is no error."""
    peak_at(monkeypatch, 1)
    conclude = Guard.conclude

    def lose(self: Guard, last: int) -> None:
        for folder in (tmp_path / "run/checkpoints/guard-best").glob("checkpoint-*"):
            if damage == "gone":
                shutil.rmtree(folder)
            else:
                (folder / "policy.safetensors").write_bytes(b"abc")
        conclude(self, last)

    monkeypatch.setattr(Guard, "conclude", lose)
    training = align(tiny_job(tmp_path, **SMALL), progress=make_progress("quiet"))["ppo_training"]
    assert (training["kept_round"], training["rounds"], training["kept_lost"]) == (3, 3, 1)
    assert "round 1 was the best, but its weights" in capsys.readouterr().err
    sft, policy = (load_file(tmp_path / f"run/{part}/model.safetensors") for part in ("sft", "policy"))
    assert any((sft[name] != policy[name]).any() for name in sft)
    assert json.loads((tmp_path / "run/stages/ppo.json").read_text())["kept_round"] == 3


@pytest.mark.parametrize(("auc", "words"), [(0.45, "fewer than half, as at the start"), (0.3, "0.48 in round 0")])
def test_the_alarm_says_which_sign_it_is(auc: float, words: str) -> None:
    def look(round: int, reward: float, auc: float, probability: float) -> Look:
        return Look(round, reward, auc, 1.0, 2.0, 0.1, 0.0, 5.0, 1.0, 1.0, probability)

    said = guard_module._alarm_words([look(0, 1.0, 0.48, 0.6), look(1, 2.0, 0.48, 0.5), look(2, 3.0, auc, 0.4)])
    assert words in said and ("fewer than half" in said) == (auc == 0.45)
