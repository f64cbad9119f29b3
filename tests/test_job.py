"""The whole job on tiny models: what must hold for every architecture, both tunings, and any cut into micro-batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import srppo
from srppo import stages
from srppo.errors import ConfigError, DataError, ModelError, RunFolderError, TrainingStopped
from srppo.models.roles import Roles
from srppo.progress import make_progress
from srppo.records import TokenBatch
from srppo.train import ppo as ppo_module
from tiny_job import metrics, run, tiny_job, weights, write_rows
from tiny_models import ARCHITECTURES


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Fingerprints of base and sft before and after PPO, and the policy's logits at its end."""
    seen: dict[str, Any] = {}
    inner = stages.train_ppo

    def watching(setup: ppo_module.PPOSetup, **options: Any) -> Any:
        roles = setup.roles
        seen["before"] = (roles.fingerprint("base"), roles.fingerprint("sft"))
        state = inner(setup, **options)
        seen["after"] = (roles.fingerprint("base"), roles.fingerprint("sft"))
        ids = torch.arange(10, 22)[None]
        seen["ids"] = ids
        with roles.use("policy") as model:
            seen["logits"] = model(input_ids=ids).logits
        seen["moved"] = roles.fingerprint("policy") != seen["before"][1]
        return state

    monkeypatch.setattr(stages, "train_ppo", watching)
    yield seen


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_in_both_tunings(architecture: str, kind: str, tmp_path: Path, watched: dict[str, Any]) -> None:
    config = tiny_job(
        tmp_path,
        architecture,
        kind,
        ppo__iterations=2,
        ppo__critic_warmup=0,
        ppo__minibatches=1,
        ppo__epochs=1,
        sft__steps=2,
        guard__keep="last",  # random models learn nothing that a guard would keep
        diagnose__samples=2,
    )
    summary = run(config)
    assert watched["before"] == watched["after"] and watched["moved"]  # base and sft bit-identical, the policy not
    for record in metrics(config.output):  # one step a round: the trainer sees the very policy that sampled
        assert record["val/ratio"] == pytest.approx(1.0, abs=2e-6) and record["rollout/max_abs"] < 2e-5
        assert record["policy/approxkl_avg"] < 1e-9
    for stage in ("base", "sft", "sft_continued", "srppo"):
        assert {"sampled", "greedy", "mean_length", "n"} <= set(summary[stage]["all"])
    output = Path(config.output)
    if kind == "full":
        loaded = AutoModelForCausalLM.from_pretrained(output / "policy")
    else:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.name), output / "policy")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=watched["ids"]).logits, watched["logits"])
    assert (output / "report.html").is_file() and (output / "critic/value_head.safetensors").is_file()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_micro_batches_change_nothing(kind: str, tmp_path: Path) -> None:
    ends = []
    for tokens in (1, 400):
        output = str(tmp_path / f"run{tokens}")
        changes: dict[str, Any] = {f"{stage}__micro_batch_tokens": tokens for stage in ("sft", "ppo")}
        changes |= {f"{stage}__adam_epsilon": 1e-6 for stage in ("sft", "ppo")}  # with 1e-8 rounded zeros move a weight as gradients do
        run(tiny_job(tmp_path, "llama", kind, output=output, ppo__iterations=2, **changes))
        ends.append(weights(Path(output) / "policy") | {f"critic {k}": v for k, v in weights(Path(output) / "critic").items()})
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_recomputed_log_probabilities_make_the_first_ratio_one(kind: str, tmp_path: Path) -> None:
    """In bfloat16 the engine and the trainer differ, so the engine's word would not; what it costs is counted."""
    passes = {}
    for word in ("recompute", "rollout"):
        changes: dict[str, Any] = {"ppo__behaviour_logprobs": word, "model__autocast": "bfloat16", "ppo__iterations": 1, "ppo__epochs": 1}
        changes |= {"ppo__minibatches": 1, "ppo__critic_warmup": 0, "guard__every": 0, "diagnose__enabled": False}
        config = tiny_job(tmp_path, "llama", kind, output=str(tmp_path / word), **changes)
        run(config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"continued_sft": False})}))
        record = metrics(config.output)[0]
        passes[word] = record["compute/passes"]
        assert record["rollout/max_abs"] > 1e-4
        if word == "recompute":
            assert record["val/ratio"] == pytest.approx(1.0, abs=1e-6) and record["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-9)
        else:
            assert record["policy/approxkl_avg"] > 1e-9
    tokens = [json.loads(line)["length"] for line in (tmp_path / "rollout/samples.jsonl").read_text().splitlines()]
    assert passes["recompute"] - passes["rollout"] >= sum(tokens)


def test_repeated_non_finite_steps_stop_the_run_and_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_job(tmp_path, ppo__max_skipped_steps=2, ppo__critic_warmup=0)
    inner = ppo_module.make_experience

    def poisoned(*args: Any) -> Any:
        experience = inner(*args)
        experience.advantages[:, 0] = float("nan")
        return experience

    monkeypatch.setattr(ppo_module, "make_experience", poisoned)
    with pytest.raises(TrainingStopped, match="2 steps in a row"):
        run(config)
    saved = Path(config.output) / "checkpoints/stopped/checkpoint-0/policy.safetensors"
    sft = weights(Path(config.output) / "sft")
    assert all(torch.equal(sft[n], t) for n, t in load_file(saved).items() if n in sft)  # nothing moved


def test_one_bad_step_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_job(tmp_path, ppo__critic_warmup=0)
    inner, calls = Roles.score, []

    def sometimes(self: Roles, role: str, batch: TokenBatch, **options: Any) -> Any:
        scores = inner(self, role, batch, **options)
        if role == "policy" and options.get("train"):
            calls.append(1)
            if len(calls) == 1:
                return type(scores)(scores.logprobs * float("nan"))
        return scores

    monkeypatch.setattr(Roles, "score", sometimes)
    summary = run(config)
    assert summary["ppo_training"]["skipped_steps"] == 1 and metrics(config.output)[-1]["policy/skipped_steps"] == 1


def test_critic_warm_up_leaves_the_policy(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, ppo__iterations=2, ppo__critic_warmup=2)
    run(config)
    sft, policy = weights(Path(config.output) / "sft"), weights(Path(config.output) / "policy")
    assert all(torch.equal(sft[n], policy[n]) for n in sft)
    assert all(r["policy/steps"] == 0 for r in metrics(config.output))


def test_target_kl_stops_the_epochs(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, ppo__epochs=4, ppo__target_kl=1e-9, ppo__critic_warmup=0, ppo__learning_rate=1e-2)
    run(config)
    assert all(r["policy/kl_stopped"] == 1 and r["policy/steps"] == 2 for r in metrics(config.output))


@pytest.mark.parametrize("checkpoint", ["sft", 0.5])
def test_the_score_is_the_log_ratio_of_the_named_checkpoint_to_the_base(checkpoint: str | float, tmp_path: Path) -> None:
    """Recomputed from the saved models by plain transformers."""
    config = tiny_job(tmp_path, reward__checkpoint=checkpoint, ppo__iterations=1, sft__steps=6)
    run(config)
    output = Path(config.output)
    numerator = output / ("sft" if checkpoint == "sft" else "sft_checkpoints/share-0.5")
    sft, base = (AutoModelForCausalLM.from_pretrained(place) for place in (numerator, config.model.name))
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    for row in [r for r in rows if r["ended"] and r["length"] == len(r["response"]) + 1][:3]:  # one token a character, and EOS
        prompt, response = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            said = [m(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1] for m in (sft, base)]
        picked = [x.gather(1, torch.tensor(response)[:, None]).sum() for x in said]
        if tokenizer.decode(response[:-1]) == row["response"]:
            assert row["score"] == pytest.approx(float(picked[0] - picked[1]), abs=1e-3)


def test_overwrite_keeps_the_old_run_when_the_new_one_cannot_start(tmp_path: Path) -> None:
    config = tiny_job(tmp_path)
    run(config)
    with pytest.raises(RunFolderError, match="resume"):
        run(config)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="empty"):
        run(tiny_job(tmp_path, data__demonstrations=empty), overwrite=True)
    assert (Path(config.output) / "summary.json").is_file()


def test_bad_input_leaves_no_folder(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, data__prompts=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="nowhere"):
        run(config)
    assert not Path(config.output).exists()


def test_sft_and_ppo_apart_equal_align(tmp_path: Path) -> None:
    whole = tiny_job(tmp_path, output=str(tmp_path / "whole"))
    run(whole)
    parts = tiny_job(tmp_path, output=str(tmp_path / "parts"))
    srppo.run_sft(parts, progress=make_progress("quiet"))
    srppo.run_ppo(parts, resume=True, progress=make_progress("quiet"))
    one, other = weights(tmp_path / "whole/policy"), weights(tmp_path / "parts/policy")
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_sft_learns_something_trivial(tmp_path: Path) -> None:
    demonstrations = write_rows(tmp_path / "same.jsonl", [{"prompt": f"say {i}:", "completion": " ok"} for i in range(20)])
    config = tiny_job(tmp_path, data__demonstrations=demonstrations, sft__steps=40, ppo__iterations=0)
    summary = run(config)
    assert summary["base"]["all"]["greedy"] == 0.0 and summary["sft"]["all"]["greedy"] == 1.0


def test_ppo_climbs_its_reward(tmp_path: Path) -> None:
    config = tiny_job(
        tmp_path, ppo__iterations=15, ppo__prompts_per_iteration=16, reward__kl_coef=0.05, ppo__learning_rate=3e-3, ppo__checkpoint_every=0
    )
    run(config)
    scores = [r["objective/scores"] for r in metrics(config.output)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_recomputed_activations_change_nothing(kind: str, tmp_path: Path) -> None:
    """The backward pass recomputes the forward one: it must do so as the same role, with the same adapter on."""
    ends = []
    for recompute in (False, True):
        output = str(tmp_path / f"run{recompute}")
        run(tiny_job(tmp_path, "llama", kind, output=output, model__gradient_checkpointing=recompute, ppo__iterations=2))
        ends.append(weights(Path(output) / "policy") | {f"critic {k}": v for k, v in weights(Path(output) / "critic").items()})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=3e-5)


def test_a_finished_run_is_evaluated_again_by_other_settings(tmp_path: Path) -> None:
    config = tiny_job(tmp_path)
    before = run(config)
    more = tiny_job(tmp_path, evaluation__samples=3)
    after = srppo.run_evaluate(config.output, more, progress=make_progress("quiet"))
    for stage in ("base", "sft", "sft_continued", "srppo"):
        assert before[stage]["all"]["samples"] == 1 and after[stage]["all"]["samples"] == 3
        assert before[stage]["all"]["greedy"] == after[stage]["all"]["greedy"]
        assert before["heldout_nll"][stage] == pytest.approx(after["heldout_nll"][stage], rel=1e-6)


def test_another_model_is_evaluated_by_a_recipe(tmp_path: Path) -> None:
    first = run(tiny_job(tmp_path, output=str(tmp_path / "first"), reward__checkpoint=0.5))
    recipe = tiny_job(tmp_path, output=str(tmp_path / "second"), reward__checkpoint=0.5)
    again = srppo.run_evaluate(str(tmp_path / "first/policy"), recipe, progress=make_progress("quiet"))
    assert again["sft"] == first["srppo"]


def test_a_run_of_another_version_is_evaluated_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_job(tmp_path)
    before = srppo.run_sft(config, progress=make_progress("quiet"))
    path = Path(config.output) / "config.yaml"
    path.write_text(path.read_text().replace("ppo:\n", "ppo:\n  value_coef: 0.1\n", 1))
    after = srppo.run_evaluate(config.output, progress=make_progress("quiet"))
    assert after["sft"] == before["sft"] and "are ignored: ppo.value_coef" in capsys.readouterr().err


def test_a_round_without_an_ended_rollout_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_job(tmp_path, rollout__max_new_tokens=1, reward__missing_eos="exclude", ppo__iterations=1, evaluation__continued_sft=False))
    assert "iteration 1: every rollout was cut at the length limit and left out" in capsys.readouterr().err


def test_a_finished_sft_model_can_be_the_start(tmp_path: Path) -> None:
    fixed: dict[str, Any] = {"sft__keep": "last", "reward__checkpoint": "sft", "reward__kl_coef": 1.0, "guard__keep": "last"}
    run(tiny_job(tmp_path, output=str(tmp_path / "first"), **fixed))
    config = tiny_job(tmp_path, output=str(tmp_path / "second"), sft__checkpoint=str(tmp_path / "first/sft"), **fixed)
    summary = run(config)
    one, other = weights(tmp_path / "first/policy"), weights(tmp_path / "second/policy")
    assert all(torch.equal(one[n], other[n]) for n in one) and summary["sft_continued"]["all"]["n"] == 4


def test_a_wrong_start_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for changes in ({"sft__checkpoint": str(tmp_path / "none")}, {"reward__checkpoint": str(tmp_path / "none")}):
        config = tiny_job(tmp_path, **changes)
        with pytest.raises(ModelError, match="none"):
            run(config)
        assert not Path(config.output).exists()
    config = tiny_job(tmp_path)
    with pytest.raises(ConfigError, match="no SFT model"):
        srppo.run_ppo(config, progress=make_progress("quiet"))
    assert not Path(config.output).exists()


def test_shares_that_fall_on_one_step_are_all_there(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, sft__steps=2, sft__checkpoints_at=[0.25, 0.5, 1.0], sft__keep=0.25, reward__checkpoint=0.5)
    run(config)
    shares = sorted(p.name for p in (Path(config.output) / "sft_checkpoints").iterdir())
    assert shares == ["share-0.25", "share-0.5", "share-1"]


def test_a_prompt_without_room_for_an_answer_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 505}, *({"prompt": f"say {i}?"} for i in range(8))]  # the tiny model has 512 positions
    config = tiny_job(tmp_path, data__prompts=write_rows(tmp_path / "long.jsonl", rows), data__max_prompt_tokens=600)
    run(config)
    assert json.loads((Path(config.output) / "data.json").read_text())["prompts"]["used"] == 8


def test_frozen_roles_in_lower_precision(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, model__frozen_dtype="bfloat16")
    run(config)
    assert {t.dtype for t in weights(Path(config.output) / "policy").values()} == {torch.float32}
    continued = json.loads((Path(config.output) / "stages/sft_continued.json").read_text())
    if continued["kept_step"] == 0:  # nothing better was found: it must be the SFT model, unrounded
        one, other = weights(Path(config.output) / "sft"), weights(Path(config.output) / "sft_continued")
        assert all(torch.equal(one[n], other[n]) for n in one)
