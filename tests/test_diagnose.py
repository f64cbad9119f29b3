"""The reward card on tiny models and in whole runs: figures against a slow twin, decisions obeyed, no-go obeyed, roles left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import srppo
from srppo import workspace
from srppo.config import RunConfig, build, merge
from srppo.diagnose import Checkpoints
from srppo.diagnose.candidates import Pair, choose_pair, suggest_beta
from srppo.diagnose.evidence import spread_prompts
from srppo.diagnose.inquiry import considered
from srppo.diagnose.reward_card import RewardCard
from srppo.errors import RewardRefused
from srppo.job import align, run_diagnose
from srppo.methods.srppo import first_beta
from srppo.progress import make_progress
from srppo.records import Prompt
from tiny_job import tiny_job

QUIET: dict[str, Any] = {"progress": make_progress("quiet")}
SMALL: dict[str, Any] = {"diagnose__samples": 4, "diagnose__prompts": 6, "diagnose__betas": [0.5, 1.0, 2.0], "guard__every": 0}


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    return build(merge(config.model_dump(), {k.replace("__", "."): v for k, v in changes.items()}))


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """A whole run with the card, and its summary."""
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_job(folder, kind=request.param, diagnose__on_no_go="warn", **SMALL)
    return config, align(config, **QUIET)


def test_the_card_is_kept_and_obeyed(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    config, summary = finished
    run = Path(config.output)
    card = json.loads((run / "diagnose.json").read_text())
    assert card["verdict"] in ("go", "caution", "no-go") and card["reasons"] and card["heldout"] == 4 and card["prompts"] == 6
    assert set(card) == set(RewardCard.__dataclass_fields__)
    decision = json.loads((run / "stages/diagnose.json").read_text())["decision"]
    assert decision["automatic"] == ["sft.keep", "reward.checkpoint", "reward.kl_coef"]
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {r["objective/beta"] for r in rounds if r["stage"] == "ppo" and "iteration" in r} == {decision["beta"]}
    assert {c["start"] for c in card["candidates"]} == {"share-0.5", "share-1"} and sum(c["chosen"] for c in card["candidates"]) == 1
    assert {p["name"].split(",")[0] for p in card["preview"]} == {"base", "sft", "logits", "weights"}
    assert {m["author"] for m in card["maps"]} == {"demonstration", "base", "sft"}
    for token_map in card["maps"]:
        assert len(token_map["tokens"]) == len(token_map["log_ratio"])
    assert summary["srppo"]


def test_rewards_are_the_models_own(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    """The demonstrations' log-ratios, against a plain forward of the saved folders."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, _ = finished
    run = Path(config.output)
    card = json.loads((run / "diagnose.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    folder = run / f"sft_checkpoints/{card['decision']['numerator']}"
    if config.tuning.kind == "lora":
        sft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.name), folder)
    else:
        sft = AutoModelForCausalLM.from_pretrained(folder)
    shown = [m for m in card["maps"] if m["author"] == "demonstration"]
    assert shown
    for token_map in shown:
        prompt = tokenizer(token_map["prompt"], add_special_tokens=False).input_ids
        response = list(tokenizer.convert_tokens_to_ids(tokenizer.tokenize("".join(token_map["tokens"]))))
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            ratio = sft(ids).logits.log_softmax(-1) - base(ids).logits.log_softmax(-1)
        wanted = ratio[0, len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert token_map["log_ratio"] == pytest.approx(wanted.tolist(), abs=2e-4)


def test_the_card_changes_nothing_else(tmp_path: Path) -> None:
    """Fixed settings: the run with a card and the one without give the same policy, bit by bit."""
    fixed: dict[str, Any] = {"sft__keep": "last", "reward__checkpoint": "sft", "reward__kl_coef": 0.7, "diagnose__on_no_go": "warn"}
    config = tiny_job(tmp_path, **SMALL, **fixed)
    align(config, **QUIET)
    other = changed(config, output=str(tmp_path / "other"), diagnose__enabled=False)
    align(other, **QUIET)
    assert not (tmp_path / "other/diagnose.json").exists()
    one, two = ((tmp_path / name / "policy/model.safetensors").read_bytes() for name in ("run", "other"))
    assert one == two


def test_no_go_stops_and_can_be_overruled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srppo.diagnose.inquiry.judge_reward", lambda card: ("no-go", ["It would do harm."]))
    config = tiny_job(tmp_path, **SMALL)
    with pytest.raises(RewardRefused, match=r"It would do harm.*--resume --diagnose.on_no_go warn"):
        align(config, **QUIET)
    assert not (tmp_path / "run/policy").exists() and (tmp_path / "run/sft").exists()
    with pytest.raises(RewardRefused):
        align(config, resume=True, **QUIET)
    assert align(changed(config, diagnose__on_no_go="warn"), resume=True, **QUIET)["srppo"]


def test_an_earlier_start_is_put_in_place_of_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the card chooses share-0.5, sft/ and everything after go by it; a later look at the run finds it there."""
    monkeypatch.setattr("srppo.diagnose.inquiry.choose_pair", lambda pairs: next(p for p in pairs if p.start == "share-0.5"))
    config = tiny_job(tmp_path, diagnose__on_no_go="warn", **SMALL)
    align(config, **QUIET)
    run = tmp_path / "run"
    assert (run / "sft/model.safetensors").read_bytes() == (run / "sft_checkpoints/share-0.5/model.safetensors").read_bytes()
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(r for r in rounds if r["stage"] == "ppo" and r.get("iteration") == 1)
    assert first["objective/kl_sft"] == pytest.approx(0, abs=1e-5)  # the policy starts at what sft is now
    again = run_diagnose(config, resume=True, **QUIET)
    assert [(c["start"], c["numerator"]) for c in again["candidates"]] == [("share-0.5", "share-0.5")]  # what PPO used


def test_diagnose_alone_then_align(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, diagnose__on_no_go="warn", **SMALL)
    card = run_diagnose(config, **QUIET)
    assert not (tmp_path / "run/policy").exists()
    summary = align(config, resume=True, **QUIET)
    assert summary["srppo"] and json.loads((tmp_path / "run/diagnose.json").read_text())["decision"] == card["decision"]


def test_without_heldout_demonstrations(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, data__heldout=0, **SMALL)
    card = run_diagnose(config, **QUIET)
    assert card["verdict"] == "caution" and "no held-out demonstrations" in " ".join(card["reasons"])
    assert card["decision"]["beta"] == 1.0 and card["decision"]["start"] == card["decision"]["numerator"] == "share-1"


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, {("share-0.5", "share-0.5"), ("share-0.5", "share-1"), ("share-1", "share-0.5"), ("share-1", "share-1")}),
        ({"sft.keep": "last"}, {("share-1", "share-0.5"), ("share-1", "share-1")}),
        ({"reward.checkpoint": "sft"}, {("share-0.5", "share-0.5"), ("share-1", "share-1")}),
        ({"reward.checkpoint": 0.5, "sft.checkpoints_at": [0.5, 1.0]}, {("share-0.5", "share-0.5"), ("share-1", "share-0.5")}),
        ({"reward.checkpoint": "some/folder", "sft.keep": "best"}, {("share-1", "reward")}),
    ],
)
def test_only_what_is_auto_is_open(changes: dict[str, Any], pairs: set[tuple[str, str]]) -> None:
    checkpoints = Checkpoints(["share-0.5", "share-1"], {"share-1": "sft"}, {"share-0.5": "there"})
    found = considered(checkpoints, build(merge({}, changes)))
    assert set(found) == pairs and found[-1][0] == "share-1"


def pair(name: str, loglikelihood: list[float], gains: dict[float, list[float]], effective: float = 1.0) -> Pair:
    tables = {b: np.array(g) for b, g in gains.items()}
    found = Pair(name, name, np.zeros(len(loglikelihood)), np.array(loglikelihood), tables, dict.fromkeys(gains, effective))
    return replace(found, beta=suggest_beta(found))


def test_beta_is_one_unless_another_is_clearly_better() -> None:
    assert pair("a", [0.0] * 3, {1.0: [0.1, 0.0, 0.2], 2.0: [0.2, 0.1, 0.31]}).beta == 2.0
    assert pair("a", [0.0] * 3, {1.0: [0.1, 0.0, 0.2], 2.0: [0.9, -0.4, 0.1]}).beta == 1.0  # +0.10, standard error 0.36
    assert pair("a", [0.0] * 3, {0.3: [9.0, 9.0, 9.0], 1.0: [0.1, 0.0, 0.2]}).beta == 1.0  # smaller than is ever taken
    assert pair("a", [0.0], {1.0: [0.1], 2.0: [0.9]}).beta == 1.0  # one prompt tells nothing


def test_beta_is_where_the_predicted_gain_is_highest() -> None:
    assert pair("a", [0.0] * 2, {0.5: [-1.0, 0.0], 1.0: [0.1, 0.1], 2.0: [0.05, 0.05]}).beta == 1.0
    assert pair("a", [0.0] * 2, {0.5: [0.1, 0.3], 1.0: [0.1, 0.296], 2.0: [0.0, 0.1]}).beta == 1.0  # as good as equal: the gentler
    assert pair("a", [0.0] * 2, {0.5: [-3.0, -3.0], 2.0: [-0.1, -0.1]}).beta == 2.0  # nothing helps: what harms least
    assert pair("a", [0.0] * 2, {0.5: [9.0, 9.0], 2.0: [9.0, 9.0]}, effective=0.1).beta == 2.0  # the samples cannot judge


def test_another_pair_is_chosen_only_where_it_is_clearly_better() -> None:
    default = pair("default", [-1.0, -2.0, -3.0], {1.0: [0.1, 0.1, 0.1]})
    better = pair("better", [-1.0, -2.0, -3.0], {1.0: [0.4, 0.5, 0.6]})
    noisy = pair("noisy", [-1.0, -2.0, -3.0], {1.0: [3.0, -2.0, 0.1]})
    assert choose_pair([better, default]) is better
    assert choose_pair([noisy, default]) is default
    assert choose_pair([]) is None


def test_prompts_are_taken_from_the_groups_in_turn() -> None:
    prompts = [Prompt([i], "", i, "ab"[i >= 5]) for i in range(8)]
    assert [p.row for p in spread_prompts(prompts, 5)] == [0, 5, 1, 6, 2]
    assert spread_prompts(prompts, 0) == [] and len(spread_prompts(prompts, 99)) == 8


def test_auto_without_a_card_is_the_default(tmp_path: Path) -> None:
    assert first_beta(build({}).reward) == 1.0
    with pytest.raises(Exception, match="auto, 0 or above"):
        build({"reward": {"kl_coef": -1}})


# --- what the run folder holds, and what of it a second look may change


def first_looked_at(card: dict[str, Any]) -> list[float]:
    return [round(c["start_nll"], 6) for c in card["candidates"]]


def take(monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setattr("srppo.diagnose.inquiry.choose_pair", lambda pairs: next(p for p in pairs if p.start == p.numerator == start))


def test_the_sft_row_is_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT evaluated first, PPO later: where the card moves the start, the SFT is evaluated anew."""
    take(monkeypatch, "share-0.5")
    config = tiny_job(tmp_path, diagnose__on_no_go="warn", **SMALL)
    srppo.run_sft(config, **QUIET)
    stage = tmp_path / "run/stages/evaluate-sft.json"
    before = json.loads(stage.read_text())["heldout_nll"]
    srppo.run_ppo(config, resume=True, **QUIET)
    sft = json.loads((tmp_path / "run/stages/sft.json").read_text())
    half = next(c["heldout_nll"] for c in sft["checkpoints"] if c["share"] == 0.5)
    assert before != json.loads(stage.read_text())["heldout_nll"] == pytest.approx(half, abs=1e-5)


def test_a_second_card_sees_the_same_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "share-0.5")
    config = tiny_job(tmp_path, diagnose__on_no_go="warn", **SMALL)
    first, second = run_diagnose(config, **QUIET), run_diagnose(config, resume=True, **QUIET)
    assert first_looked_at(first) == first_looked_at(second) and len(set(first_looked_at(first))) == 2
    monkeypatch.setattr("srppo.job.ppo_stage", lambda space: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # obeyed, then stopped before PPO
        align(config, resume=True, **QUIET)
    assert first_looked_at(run_diagnose(config, resume=True, **QUIET)) == first_looked_at(first)
    take(monkeypatch, "share-1")
    run_diagnose(config, resume=True, **QUIET)
    with pytest.raises(KeyboardInterrupt):
        align(config, resume=True, **QUIET)
    one, other = (tmp_path / f"run/{name}/model.safetensors" for name in ("sft", "sft_checkpoints/share-1"))
    assert one.read_bytes() == other.read_bytes()


def test_once_ppo_has_begun_a_card_decides_nothing(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, diagnose__on_no_go="warn", **SMALL)
    align(config, **QUIET)
    stage = (tmp_path / "run/stages/diagnose.json").read_text()
    used = json.loads(stage)["decision"]
    card = run_diagnose(changed(config, diagnose__betas=[3.0, 5.0]), resume=True, **QUIET)
    assert (tmp_path / "run/stages/diagnose.json").read_text() == stage
    assert (card["decision"]["beta"], card["decision"]["start"], card["decision"]["automatic"]) == (
        used["beta"],
        used["start"],
        used["automatic"],
    )
    align(config, resume=True, **QUIET)  # other diagnose settings do not lock a run


def test_a_prompt_without_room_for_an_answer_is_left_out(tmp_path: Path) -> None:
    """Of 21 rows all but one are held out, among them the long one."""
    config = tiny_job(tmp_path, data__heldout=20, data__max_tokens=512, data__max_prompt_tokens=511, sft__steps=1, **SMALL)
    path = Path(config.data.demonstrations)
    long = {"prompt": "a" * 507 + ":", "completion": "b"}
    path.write_text(path.read_text() + json.dumps(long) + "\n", encoding="utf-8")
    assert run_diagnose(config, **QUIET)["heldout"] == 19
    assert json.loads((tmp_path / "run/data.json").read_text())["demonstrations"]["heldout"] == 20


def test_another_anchor_has_no_predicted_gain(tmp_path: Path) -> None:
    card = run_diagnose(tiny_job(tmp_path, reward__kl_anchor="base", **SMALL), **QUIET)
    assert card["betas"] == [] and card["decision"]["gain"]["value"] is None and card["decision"]["beta"] == 1.0
    assert not any("logits" in p["name"] for p in card["preview"])


def test_a_scorer_that_fits_not_every_row_is_left_out(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, evaluation__scorer="exact_match", **SMALL)
    path = Path(config.data.prompts or "")
    path.write_text("".join(json.dumps({"prompt": f"say {i}?", **({"answer": "1"} if i % 2 else {})}) + "\n" for i in range(20)))
    card = run_diagnose(config, **QUIET)
    assert all(row["accuracy"] is None for row in card["betas"] if row["group"] != "held-out")


def test_a_path_as_numerator_without_ppo(tmp_path: Path) -> None:
    srppo.run_sft(tiny_job(tmp_path, output=str(tmp_path / "first")), **QUIET)
    config = tiny_job(tmp_path, ppo__iterations=0, reward__checkpoint=str(tmp_path / "first/sft"), **SMALL)
    assert run_diagnose(config, **QUIET)["decision"]["numerator"] == "reward"


def test_without_room_for_two_models_there_is_no_preview_by_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where weights are spread and vLLM decodes."""
    load = workspace._load
    monkeypatch.setattr(workspace, "_load", lambda *given: replace(load(*given), extrapolator=None))
    card = run_diagnose(tiny_job(tmp_path, **SMALL), progress=make_progress("plain"))
    assert {p["name"].split(",")[0] for p in card["preview"]} == {"base", "sft", "weights"}
    assert "no preview by logits" in capsys.readouterr().out


def test_an_sft_of_another_architecture_has_no_preview_by_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_job(tmp_path, "qwen2").model.name
    card = run_diagnose(tiny_job(tmp_path, sft__checkpoint=other, **SMALL), progress=make_progress("plain"))
    assert {p["name"].split(",")[0] for p in card["preview"]} == {"base", "sft", "logits"}
    assert "of another architecture than the base" in capsys.readouterr().out


def test_only_the_listed_betas_are_looked_at(tmp_path: Path) -> None:
    card = run_diagnose(tiny_job(tmp_path, **{**SMALL, "diagnose__betas": [2.0, 4.0]}), **QUIET)
    assert {row["beta"] for row in card["betas"]} == {2.0, 4.0} and card["decision"]["beta"] in (2.0, 4.0)


def test_a_no_go_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srppo.diagnose.inquiry.judge_reward", lambda card: ("no-go", ["It would do harm."]))
    with pytest.raises(RewardRefused, match=r"report.html"):
        align(tiny_job(tmp_path, **SMALL), **QUIET)
    assert "It would do harm." in (tmp_path / "run/report.html").read_text()
