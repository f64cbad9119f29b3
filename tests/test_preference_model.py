"""Reward models: the scores are Hugging Face's own, row by row; any classifier; what PPO makes of them; wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    MPNetConfig,
    PreTrainedModel,
    RobertaConfig,
)

import srppo
import tiny_tokenizers
from srppo.config import build
from srppo.errors import ConfigError, ModelError
from srppo.flags import parse_overrides
from srppo.models.preference_model import PreferenceModel, _positions
from srppo.progress import make_progress
from srppo.records import Prompt, Rollout
from srppo.rewards import PreferenceReward
from srppo.train.interrupt import Interrupted
from tiny_job import StopAt, tiny_job
from tiny_models import EOS, save_tiny, tiny_tokenizer

PROMPTS = [
    Prompt([7, 8, 9], "012", 0),
    Prompt([10, 11], "34", 1, messages=[{"role": "user", "content": "34"}]),
    Prompt([12, 13, 14, 15, 16], "56789", 2, messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "?"}]),
]


def classifier(folder: Path, architecture: str = "llama", labels: int = 1, tokenizer: Any = None, **changes: Any) -> str:
    """A random classifier on disk, its tokenizer beside it."""
    causal = save_tiny(folder / "causal", architecture, tokenizer=tokenizer, **changes)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=labels)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "classifier")
    (tokenizer or tiny_tokenizer()).save_pretrained(folder / "classifier")
    return str(folder / "classifier")


def bert(folder: Path, tokenizer: Any) -> str:
    torch.manual_seed(4)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 96}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **size))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return str(folder / "bert")


def edit(name: str, **changes: Any) -> None:
    """Change a classifier's config.json."""
    file = Path(name) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rollout() -> Rollout:
    """Responses of 4, 1, 6 and 2 tokens to the three prompts, the first once more; two end with EOS."""
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(17, 90, (4, 6), generator=generator)
    lengths = torch.tensor([4, 1, 6, 2])
    mask = torch.arange(6) < lengths[:, None]
    responses[0, 3] = responses[3, 1] = EOS
    which = [0, 1, 2, 0]
    ended = torch.tensor([True, False, False, True])
    return Rollout([PROMPTS[i].ids for i in which], which, torch.where(mask, responses, 0), mask, torch.zeros(4, 6), ended)


def asked(name: str, policy: Any = None, label: Any = None, **model: Any) -> PreferenceModel:
    tokenizer = policy or tiny_tokenizer()
    reward = {"kind": "preference_model", "preference_model": name, "preference_label": label}
    config = build({"reward": reward, "model": {"device": "cpu", **model}, "rollout": {"max_new_tokens": 6}})
    return PreferenceModel(config, PROMPTS, tokenizer, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))


def alone(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[labels] of one sequence without padding, by Hugging Face."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("pad", [None, EOS, 0], ids=["no pad token", "pad is eos", "pad of its own"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_scores_are_those_of_each_sequence_alone(architecture: str, pad: int | None, tmp_path: Path) -> None:
    name = classifier(tmp_path, architecture, pad_token_id=pad)
    model, data = AutoModelForSequenceClassification.from_pretrained(name).eval(), rollout()
    wanted = [float(alone(model, data.prompt_ids[row] + data.response_ids(row))[0]) for row in range(4)]
    assert max(wanted) - min(wanted) > 0.1
    for tokens in (1, 20, 1000):
        assert asked(name).scores(data, tokens).tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_chosen_label_by_its_log_odds(tmp_path: Path) -> None:
    name = classifier(tmp_path, labels=3)
    model, data = AutoModelForSequenceClassification.from_pretrained(name).eval(), rollout()
    wanted = []
    for row in range(4):
        p = alone(model, data.prompt_ids[row] + data.response_ids(row)).softmax(-1)[1]
        wanted.append(float((p / (1 - p)).log()))
    for label in ("1", "LABEL_1"):
        assert asked(name, label=label).scores(data, 1000).tolist() == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ConfigError, match=r"has 3 labels, 0 \(LABEL_0\), .*reward.preference_label"):
        asked(name)
    with pytest.raises(ConfigError, match="'good', but the labels"):
        asked(name, label="good")


def test_another_tokenizer_reads_the_text(tmp_path: Path) -> None:
    """With a template: the conversation by it. Without: prompt and answer as text. An encoder with fewer positions is no obstacle."""
    data, policy = rollout(), tiny_tokenizer()
    answers = [policy.decode(data.response_ids(row), skip_special_tokens=True) for row in range(4)]
    for template in (True, False):
        other = tiny_tokenizers.chatml() if template else tiny_tokenizer(chat=False)
        if not template:
            other.chat_template = None
        name = bert(tmp_path / str(template), other)
        model, reader = AutoModelForSequenceClassification.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
        wanted = []
        for row in range(4):
            prompt = PROMPTS[data.prompt_index[row]]
            talk = [*(prompt.messages or [{"role": "user", "content": prompt.text}]), {"role": "assistant", "content": answers[row]}]
            ids = reader.apply_chat_template(talk, return_dict=False) if template else reader(prompt.text + answers[row])["input_ids"]
            wanted.append(float(alone(model, ids)[0]))
        assert asked(name, policy).scores(data, 1000).tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_classifier_too_short_for_the_prompts_is_refused(tmp_path: Path) -> None:
    name = classifier(tmp_path, max_position_embeddings=10)
    with pytest.raises(ModelError, match="reads 10 tokens, but a prompt has 5 and its response up to 6"):
        asked(name)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    causal = save_tiny(tmp_path / "llama")
    with pytest.raises(ModelError, match="weights of a sequence classifier"):
        asked(causal)
    with pytest.raises(ModelError, match="no such file or folder"):
        asked(str(tmp_path / "nowhere"))
    name = classifier(tmp_path / "one")
    with pytest.raises(ConfigError, match="single output"):
        asked(name, label="1")
    weights = Path(name) / "model.safetensors"
    torch.save(load_file(weights), Path(name) / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="pickle"):
        asked(name)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_labels_that_do_not_compete_are_taken_alone(problem: str, tmp_path: Path) -> None:
    name = classifier(tmp_path, labels=3)
    edit(name, problem_type=problem, id2label={"0": "2", "1": "1", "2": "0"}, label2id={"2": 0, "1": 1, "0": 2})
    model, data = AutoModelForSequenceClassification.from_pretrained(name).eval(), rollout()
    wanted = [float(alone(model, data.prompt_ids[row] + data.response_ids(row))[2]) for row in range(4)]
    assert asked(name, label="0").scores(data, 1000).tolist() == pytest.approx(wanted, abs=1e-5)  # a name goes before a number


def test_the_same_tokenizer_without_a_template_reads_the_policys_ids(tmp_path: Path) -> None:
    """The run puts a plain template on a policy that has none; the tokenizer is the classifier's all the same."""
    bare = tiny_tokenizer(chat=False)
    bare.chat_template = None
    name = classifier(tmp_path, tokenizer=bare)
    policy = tiny_tokenizer()
    config = build({"reward": {"kind": "preference_model", "preference_model": name}, "rollout": {"max_new_tokens": 6}})
    found = PreferenceModel(config, PROMPTS, policy, policy.decode, policy_templates=[None])
    model, data = AutoModelForSequenceClassification.from_pretrained(name).eval(), rollout()
    wanted = [float(alone(model, data.prompt_ids[row] + data.response_ids(row))[0]) for row in range(4)]
    assert found.scores(data, 1000).tolist() == pytest.approx(wanted, abs=1e-5)


def test_text_is_begun_once(tmp_path: Path) -> None:
    """A prompt rendered with a BOS, and a tokenizer that adds its own."""
    tokenizer = tiny_tokenizers.llama3()
    tokenizer.chat_template = None
    name = bert(tmp_path, tokenizer)
    text = tokenizer.bos_token + "hello"
    prompts = [Prompt([7, 8, 9], text, 0)]
    config = build({"reward": {"kind": "preference_model", "preference_model": name}, "rollout": {"max_new_tokens": 6}})
    found = PreferenceModel(config, prompts, tiny_tokenizer(), lambda _: " world")
    ids = found._text_ids(prompts[0], " world")
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(ids) == text + " world"


def test_what_is_too_long_loses_its_beginning_and_is_counted(tmp_path: Path) -> None:
    """A held-out demonstration may be longer than any rollout; the guard asks about it."""
    name = classifier(tmp_path, "gpt2", n_positions=12)
    model, data = AutoModelForSequenceClassification.from_pretrained(name).eval(), rollout()
    long = torch.arange(20, 36)[None].repeat(2, 1)
    mask = torch.ones_like(long).bool()
    many = Rollout([[7, 8, 9], [40]], [0, 1], long, mask, torch.zeros(mask.shape), torch.ones(2).bool())
    found = asked(name)
    assert found.scores(data, 1000).shape == (4,) and found.cut == 0
    wanted = [float(alone(model, long[0].tolist()[-12:])[0])] * 2  # an unknown prompt, of a demonstration that is all text, is no obstacle
    assert found.scores(many, 1).tolist() == pytest.approx(wanted, abs=1e-5) and found.cut == 2


@pytest.mark.parametrize("pad", [-1, 500])
def test_a_pad_token_outside_the_embedding_is_not_used(pad: int, tmp_path: Path) -> None:
    name = classifier(tmp_path, "gpt2")
    edit(name, pad_token_id=pad)
    model, data = AutoModelForSequenceClassification.from_pretrained(name).eval(), rollout()
    model.config.pad_token_id = None
    wanted = [float(alone(model, data.prompt_ids[row] + data.response_ids(row))[0]) for row in range(4)]
    assert asked(name).scores(data, 1000).tolist() == pytest.approx(wanted, abs=1e-5)


def test_scores_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    name = classifier(tmp_path)
    weights = load_file(Path(name) / "model.safetensors")
    weights["score.weight"][:] = float("nan")
    save_file(weights, Path(name) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"NaN or infinite scores; use model.dtype float32"):
        asked(name).scores(rollout(), 1000)


def test_a_classifier_whose_template_refuses_the_conversation_is_refused(tmp_path: Path) -> None:
    name = bert(tmp_path, tiny_tokenizers.gemma())
    with pytest.raises(ModelError, match=r"refuses the prompt of row 2 \(System role not supported"):
        asked(name)


def test_folders_without_a_tokenizer_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    name = bert(tmp_path / "bare", tiny_tokenizer())
    for file in Path(name).glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer files"):
        asked(name)
    with pytest.raises(ModelError, match=r"looks like owner/name\); check reward.preference_model"):
        asked("./nowhere")
    small = classifier(tmp_path / "small")
    tiny_tokenizers.chatml().save_pretrained(small)
    with pytest.raises(ModelError, match=r"its tokenizer has \d+ tokens but the classifier embeds only 103"):
        asked(small)
    both = classifier(tmp_path / "both")
    edit(both, is_encoder_decoder=True, model_type="t5")
    with pytest.raises(ModelError, match=r"encoder-decoder model \(t5\)"):
        asked(both)


def test_position_tables_with_a_padding_row_are_shorter(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 50}
    for config in (RobertaConfig(vocab_size=200, pad_token_id=1, **size), MPNetConfig(vocab_size=200, pad_token_id=1, **size)):
        model = AutoModelForSequenceClassification.from_config(config)
        assert _positions(model) == 48
        model(input_ids=torch.full((1, 48), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 49), 7))


def test_a_finished_run_needs_the_reward_model_no_more(tmp_path: Path) -> None:
    name = classifier(tmp_path / "rm")
    changes: dict[str, Any] = {"reward__kind": "preference_model", "reward__preference_model": name, "ppo__iterations": 1}
    config = tiny_job(tmp_path, evaluation__continued_sft=False, guard__every=0, **changes)
    srppo.align(config, progress=make_progress("quiet"))
    Path(name).rename(tmp_path / "elsewhere")
    srppo.align(config, resume=True, progress=make_progress("quiet"))
    srppo.run_evaluate(config.output, progress=make_progress("quiet"))
    with pytest.raises(ModelError, match=r"check reward.preference_model"):
        srppo.align(config, overwrite=True, progress=make_progress("quiet"))
    assert (Path(config.output) / "summary.json").is_file()  # nothing was touched


@pytest.mark.parametrize(("label", "read"), [("yes", "yes"), ("010", "010"), ("1", "1"), ("null", None)])
def test_labels_on_the_command_line_are_text(label: str, read: str | None) -> None:
    values = parse_overrides({"reward__preference_label": label})
    assert values == {"reward.preference_label": read}
    assert build({"reward": {"kind": "preference_model", "preference_model": "x", "preference_label": 1}}).reward.preference_label == "1"
    with pytest.raises(ConfigError, match="needs quotes"):
        build({"reward": {"kind": "preference_model", "preference_model": "x", "preference_label": True}})


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"kind": "preference_model"}, "reward.preference_model names none"),
        ({"preference_model": "x"}, "reward.kind is coherent"),
        ({"kind": "preference_model", "preference_model": "x", "placement": "token"}, "reward.placement is token"),
        ({"kind": "preference_model", "preference_model": "x", "token_clip": 1.0}, "reward.token_clip is 1.0"),
        ({"kind": "preference_model", "preference_model": "x", "checkpoint": "y"}, "reward.checkpoint is y"),
    ],
)
def test_contradictory_recipes_are_refused(reward: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build({"reward": reward})


def test_the_reward_by_hand() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [False, False, False]])
    said, ratio = torch.tensor([1.0, -2.0, 0.5, 9.0]), torch.ones(4, 3)
    out = PreferenceReward(scale=2.0, missing_eos_penalty=3.0)(said, ratio, mask, torch.tensor([True, True, False, False]))
    assert out.scores.tolist() == [2.0, -4.0, -2.0, 0.0]
    assert out.token_rewards.tolist() == [[0, 0, 2.0], [-4.0, 0, 0], [0, -2.0, 0], [0, 0, 0]]
    assert out.keep.tolist() == [True, True, True, False] and torch.equal(out.log_ratio, mask.float())
    for missing, scores, keep in (("keep", [2.0, -4.0, 1.0, 0.0], [1, 1, 1, 0]), ("exclude", [2.0, -4.0, 1.0, 0.0], [1, 1, 0, 0])):
        out = PreferenceReward(2.0, missing)(said, ratio, mask, torch.tensor([True, True, False, False]))  # type: ignore[arg-type]
        assert out.scores.tolist() == scores and out.keep.tolist() == [bool(k) for k in keep]
    white = PreferenceReward(2.0, "keep", whiten=True)(said, ratio, mask, torch.ones(4, dtype=torch.bool))
    kept = torch.tensor([2.0, -4.0, 1.0])
    assert white.token_rewards.sum(1)[:3].tolist() == pytest.approx((kept / kept.std(unbiased=False)).tolist(), rel=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_ppo_climbs_a_reward_model_and_resumes_exactly(kind: str, tmp_path: Path) -> None:
    """The same job whole and stopped: equal weights. No reward card; what it is called says what judged."""
    name = classifier(tmp_path / "rm", seed=5)
    changes: dict[str, Any] = {
        "reward__kind": "preference_model",
        "reward__preference_model": name,
        "ppo__iterations": 6,
        "ppo__learning_rate": 1e-2,
        "ppo__prompts_per_iteration": 12,
        "evaluation__continued_sft": False,
        "guard__keep": "last",
        "guard__every": 3,
    }
    whole = tiny_job(tmp_path, kind=kind, output=str(tmp_path / "whole"), **changes)
    srppo.align(whole, progress=make_progress("quiet"))
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    scores = [r["objective/scores"] for r in records if "objective/scores" in r]
    assert len(scores) == 6 and sum(scores[3:]) > sum(scores[:3])
    assert {r["objective/beta"] for r in records if "objective/beta" in r} == {0.05}
    looks = [r["guard/reward"] for r in records if "guard/reward" in r]
    assert len(looks) == 3 and looks[-1] > looks[0]
    assert not (tmp_path / "whole/diagnose.json").exists()
    assert "PPO, reward model" in (tmp_path / "whole/report.html").read_text()
    assert "reward model (arXiv 2203.02155)" in (tmp_path / "whole/policy/README.md").read_text()

    cut = tiny_job(tmp_path, kind=kind, output=str(tmp_path / "cut"), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srppo.workspace.Interrupt", lambda: StopAt(60))
        with pytest.raises(Interrupted):
            srppo.align(cut, progress=make_progress("quiet"))
    srppo.align(cut, resume=True, progress=make_progress("quiet"))
    files = [next((tmp_path / run / "policy").glob("*.safetensors")) for run in ("whole", "cut")]
    tensors = [load_file(f) for f in files]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
