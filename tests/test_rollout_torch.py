"""The torch engine against plain forward passes, Hugging Face's generate, and exact distributions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import chisquare
from transformers import PreTrainedModel

from srppo.errors import ConfigError, DataError, ModelError
from srppo.records import Rollout
from srppo.rollout import decode as decode_module
from srppo.rollout.engine import Sampling
from srppo.rollout.record import position_limit
from srppo.rollout.torch_engine import TorchEngine
from tiny_models import tiny_model

VOCAB = 48
EOS = (3, 7, 11)
LOCAL = {  # what tiny_models has not: no positions at all, and layers with a recurrent state instead of keys
    "bloom_alibi": transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.4, bos_token_id=1, eos_token_id=3, pad_token_id=None
    ),
    "qwen3_next_recurrent": transformers.Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        mlp_only_layers=[0, 1],
        initializer_range=0.2,
        max_position_embeddings=96,
    ),
}
ARCHITECTURES = ["llama", "qwen2", "gpt2", "mistral", "gemma2", "gemma3", *LOCAL]


@dataclass(frozen=True)
class Special:
    pad_id: int = 0
    eos_ids: tuple[int, ...] = EOS


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A random model with weights so large that a wrong position or mask would change its logits clearly."""
    if name not in LOCAL:
        positions = {"n_positions" if name == "gpt2" else "max_position_embeddings": 96}
        spread = 0.2 if name.startswith("gemma") else 0.35  # scaled embeddings
        return tiny_model(name, vocabulary=VOCAB, spread=spread, **{**positions, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(LOCAL[name]).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {}


@pytest.fixture(params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest, models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models.setdefault(request.param, build(request.param))


@pytest.fixture
def llama(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models.setdefault("llama", build("llama"))


def some_prompts(count: int = 24, seed: int = 0) -> list[list[int]]:
    """Lengths 1 to 19, each prompt twice (not side by side)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count // 2,), generator=generator).tolist()
    half = [torch.randint(12, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return half + half


def plain_logprobs(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The slow twin: one unpadded row, one forward pass, no cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    scores = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return scores.gather(1, torch.tensor(response)[:, None])[:, 0]


def assert_plain(model: PreTrainedModel, rollout: Rollout, tolerance: float = 1e-4) -> None:
    for row, prompt in enumerate(rollout.prompt_ids):
        mask = rollout.mask[row]
        torch.testing.assert_close(
            rollout.behaviour_logprobs[row][mask], plain_logprobs(model, prompt, rollout.response_ids(row)), atol=tolerance, rtol=0
        )
    assert not rollout.behaviour_logprobs[~rollout.mask].any() and not rollout.responses[~rollout.mask].any()


def same(a: Rollout, b: Rollout, rows: list[int] | None = None) -> None:
    """Row i of a is row rows[i] of b, to float rounding."""
    for i, r in enumerate(rows or range(len(a.prompt_ids))):
        assert a.prompt_ids[i] == b.prompt_ids[r] and a.response_ids(i) == b.response_ids(r) and a.ended[i] == b.ended[r]
        torch.testing.assert_close(a.behaviour_logprobs[i][a.mask[i]], b.behaviour_logprobs[r][b.mask[r]], atol=1e-4, rtol=0)


def test_logprobs_are_a_plain_forwards(model: PreTrainedModel) -> None:
    prompts = some_prompts()
    rollout = TorchEngine(Special(), 24).generate(model, prompts, range(24), Sampling(40))
    assert rollout.prompt_ids == prompts and rollout.prompt_index == list(range(24))
    assert len(set(rollout.lengths.tolist())) > 3  # rows left at different steps
    assert int((rollout.lengths + torch.tensor([len(p) for p in prompts])).max()) > 20  # far past the sliding windows
    assert_plain(model, rollout)
    same(TorchEngine(Special(), 5).generate(model, prompts, range(24), Sampling(40)), rollout)


def test_ends_at_the_first_eos_of_several(llama: PreTrainedModel) -> None:
    rollout = TorchEngine(Special(), 64).generate(llama, [[20, 21]] * 200, range(200), Sampling(12))
    last = [rollout.response_ids(r)[-1] for r in range(200)]
    for row in range(200):
        assert not set(rollout.response_ids(row)[:-1]) & set(EOS)
        assert bool(rollout.ended[row]) == (last[row] in EOS)
        assert rollout.ended[row] or rollout.lengths[row] == 12
    assert set(EOS) <= set(last) and 0 < int(rollout.ended.sum()) < 200
    never = TorchEngine(Special(eos_ids=()), 64).generate(llama, [[20, 21]] * 4, range(4), Sampling(12))
    assert never.mask.all() and not never.ended.any()


@pytest.mark.parametrize("limit", [1, 30])
def test_greedy_is_hugging_faces(model: PreTrainedModel, limit: int) -> None:
    prompts = some_prompts(6, seed=1)
    rollout = TorchEngine(Special(), 4).generate(model, prompts, [0] * 6, Sampling(limit, greedy=True))
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=list(EOS), pad_token_id=0)
    for row, prompt in enumerate(prompts):
        expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=settings)
        assert rollout.response_ids(row) == expected[0, len(prompt) :].tolist()
    zero = TorchEngine(Special(), 4).generate(model, prompts, [0] * 6, Sampling(limit, temperature=0.0))
    assert torch.equal(zero.responses, rollout.responses)


def test_tokens_depend_on_the_seed_alone(model: PreTrainedModel) -> None:
    prompts, seeds = some_prompts(), list(range(100, 124))
    whole = TorchEngine(Special(), 24).generate(model, prompts, seeds, Sampling(16))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3)).tolist()
    for rows, batch_size in ((order, 24), (order, 7), (order[:9], 64), (order[:3], 1)):
        part = TorchEngine(Special(), batch_size).generate(model, [prompts[r] for r in rows], [seeds[r] for r in rows], Sampling(16))
        same(part, whole, rows)
    other = TorchEngine(Special(), 24).generate(model, prompts, [s + 1 for s in seeds], Sampling(16))
    assert sum(other.response_ids(r) != whole.response_ids(r) for r in range(24)) > 12


def test_reading_prompts_in_several_passes_changes_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts()
    whole = TorchEngine(Special(), 24).generate(model, prompts, range(24), Sampling(16))
    monkeypatch.setattr(decode_module, "PREFILL_TOKENS", 30)
    same(TorchEngine(Special(), 24).generate(model, prompts, range(24), Sampling(16)), whole)


def test_asking_seldom_which_rows_ended_changes_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: ended rows go on for some steps, and what they say then is dropped."""
    prompts = some_prompts()
    whole = TorchEngine(Special(), 24).generate(model, prompts, range(24), Sampling(19))
    monkeypatch.setattr(decode_module, "checks_every", lambda device: 8)
    same(TorchEngine(Special(), 24).generate(model, prompts, range(24), Sampling(19)), whole)


def exact_responses(model: PreTrainedModel, prompt: list[int], tokens: int, temperature: float = 1.0) -> dict[tuple[int, ...], float]:
    """Probability of every response of at most so many tokens, by enumeration."""
    done: dict[tuple[int, ...], float] = {}
    frontier: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(tokens):
        following: dict[tuple[int, ...], float] = {}
        for response, mass in frontier.items():
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + list(response)])).logits[0, -1].double()
            for token, p in enumerate((logits / temperature).softmax(-1).tolist()):
                (done if token in EOS else following)[(*response, token)] = mass * p
        frontier = following
    return {**done, **frontier}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_are_the_models_probabilities(llama: PreTrainedModel, temperature: float) -> None:
    prompt, draws = [20, 30, 40], 6000
    exact = exact_responses(llama, prompt, 2, temperature)
    rollout = TorchEngine(Special(), 3000).generate(llama, [prompt] * draws, range(draws), Sampling(2, temperature=temperature))
    counts = Counter(tuple(rollout.response_ids(r)) for r in range(draws))
    assert set(counts) <= set(exact)
    common = [r for r, p in exact.items() if p * draws >= 5]
    observed = [counts[r] for r in common] + [draws - sum(counts[r] for r in common)]
    expected = [exact[r] * draws for r in common] + [draws * (1 - sum(exact[r] for r in common))]
    assert len(common) > 30
    assert chisquare(observed, expected).pvalue > 1e-3
    # whatever the temperature, the log-probabilities are the model's own
    assert_plain(llama, TorchEngine(Special(), 8).generate(llama, [prompt] * 8, range(8), Sampling(12, temperature=temperature)))


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.95}, {"temperature": 1.5, "top_k": 6, "top_p": 0.7}])
def test_filters_keep_hugging_faces_tokens(llama: PreTrainedModel, filters: dict[str, float]) -> None:
    prompt, draws = [20, 30, 41], 3000
    with torch.no_grad():
        logits = llama(input_ids=torch.tensor([prompt])).logits[:, -1]
    if "temperature" in filters:
        logits = transformers.TemperatureLogitsWarper(filters["temperature"])(None, logits)
    if "top_k" in filters:
        logits = transformers.TopKLogitsWarper(filters["top_k"])(None, logits)
    if "top_p" in filters:
        logits = transformers.TopPLogitsWarper(filters["top_p"])(None, logits)
    exact = logits[0].double().softmax(-1)
    rollout = TorchEngine(Special(), draws).generate(llama, [prompt] * draws, range(draws), Sampling(1, **filters))
    counts = rollout.responses[:, 0].bincount(minlength=VOCAB)
    assert not counts[exact == 0].any() and 1 < int((exact > 0).sum()) < VOCAB
    kept = exact > 0
    assert chisquare(counts[kept], exact[kept] * draws).pvalue > 1e-3
    assert_plain(llama, TorchEngine(Special(), 8).generate(llama, [prompt] * 8, range(8), Sampling(12, **filters)))


def test_prompts_are_read_once_and_ended_rows_leave(llama: PreTrainedModel) -> None:
    shapes: list[tuple[int, int]] = []
    hook = llama.register_forward_pre_hook(lambda m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    try:
        rollout = TorchEngine(Special(), 64).generate(llama, [[20, 21], [30]] * 32, range(64), Sampling(60))
    finally:
        hook.remove()
    assert shapes[0] == (2, 2)  # two prompts, though each has 32 rows
    rows = [r for r, _ in shapes[1:]]
    assert {q for _, q in shapes[1:]} == {1} and rows == sorted(rows, reverse=True)
    alive = [int((rollout.lengths > step).sum()) for step in range(1, len(shapes))]
    assert all(alive[i] <= r <= alive[i] * 8 / 7 + 1 for i, r in enumerate(rows))  # at most an eighth is carried along
    assert alive[-1] < 32 and len(shapes) == int(rollout.lengths.max())


def test_all_end_at_the_first_token(llama: PreTrainedModel) -> None:
    everything = Special(eos_ids=tuple(range(VOCAB)))
    rollout = TorchEngine(everything, 4).generate(llama, some_prompts(10), range(10), Sampling(50))
    assert rollout.responses.shape == (10, 1) and rollout.mask.all() and rollout.ended.all()
    assert_plain(llama, rollout)


def test_nothing_to_do_and_prompt_index_and_progress(llama: PreTrainedModel) -> None:
    empty = TorchEngine(Special(), 4).generate(llama, [], [], Sampling(5))
    assert empty.responses.shape == empty.mask.shape == empty.behaviour_logprobs.shape == (0, 0) and empty.ended.shape == (0,)
    seen: list[tuple[int, int]] = []
    prompts = some_prompts(10)
    rollout = TorchEngine(Special(), 4).generate(
        llama, prompts, range(10), Sampling(20), prompt_index=[9] * 10, on_progress=lambda done, total: seen.append((done, total))
    )
    assert rollout.prompt_index == [9] * 10
    done = [d for d, _ in seen]
    assert done == sorted(set(done)) and done[-1] == 10 and len(done) > 3 and {t for _, t in seen} == {10}


@pytest.mark.parametrize("refill", [True, False])
def test_progress_is_told_though_no_row_ends(refill: bool, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a stop is taken within a second, not when the first of many long rows ends."""
    monkeypatch.setattr("srppo.rollout.torch_engine.TOLD_EVERY", 0.0)
    seen: list[int] = []
    engine = TorchEngine(Special(eos_ids=(VOCAB + 1,)), 4, refill=refill)  # which is never drawn
    engine.generate(llama, [[20], [21, 22]], [0, 1], Sampling(12), on_progress=lambda done, _: seen.append(done))
    assert seen.count(0) >= 5 and seen[-1] == 2


def test_prompts_that_do_not_fit(llama: PreTrainedModel) -> None:
    engine = TorchEngine(Special(), 4)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        engine.generate(llama, [[20], []], [0, 1], Sampling(4))
    with pytest.raises(DataError, match=r"prompt 1 has 93 tokens; with 4 new ones it exceeds the model's 96 positions.*over 92 tokens"):
        engine.generate(llama, [[20], [20] * 93], [0, 1], Sampling(4))
    for model in (llama, build("gpt2")):
        rollout = engine.generate(model, [[20], [20] * 92], [0, 1], Sampling(4))
        assert_plain(model, rollout, 2e-4)
    with pytest.raises(ConfigError, match=r"rollout\.batch_size"):
        TorchEngine(Special(), 0)
    with pytest.raises(ConfigError, match=r"model\.autocast"):
        TorchEngine(Special(), 1, autocast="float8")


def test_position_limit() -> None:
    llama = transformers.LlamaConfig(max_position_embeddings=2048)
    assert position_limit(llama) == 2048
    assert position_limit(transformers.GPT2Config(n_positions=77)) == 77
    assert position_limit(transformers.BloomConfig()) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 1e4}
    assert position_limit(transformers.LlamaConfig(max_position_embeddings=2048, rope_parameters=yarn)) == 8192


def test_the_model_is_left_as_it_was_and_the_record_is_trainable_data(llama: PreTrainedModel) -> None:
    model = build("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    modes = [m.training for m in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    rollout = TorchEngine(Special(), 4).generate(model, some_prompts(6), range(6), Sampling(10))
    assert [m.training for m in model.modules()] == modes and model.config.use_cache is False
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()
    same(rollout, TorchEngine(Special(), 4).generate(llama, some_prompts(6), range(6), Sampling(10)))  # no dropout
    for tensor in (rollout.responses, rollout.mask, rollout.behaviour_logprobs, rollout.ended):
        assert not tensor.is_inference() and not tensor.requires_grad and tensor.device.type == "cpu"
    scale = torch.ones((), requires_grad=True)
    (scale * rollout.behaviour_logprobs).sum().backward()
    with pytest.raises(RuntimeError, match="boom"):  # and after a failure
        TorchEngine(Special(), 4).generate(model, [[20]], [0], Sampling(3), on_progress=_boom)
    assert [m.training for m in model.modules()] == modes


def _boom(done: int, total: int) -> None:
    raise RuntimeError("boom")


def test_autocast_and_half_precision(llama: PreTrainedModel) -> None:
    prompts = some_prompts(8)
    rollout = TorchEngine(Special(), 8, autocast="bfloat16").generate(llama, prompts, range(8), Sampling(10))
    same(rollout, TorchEngine(Special(), 8).generate(llama, prompts, range(8), Sampling(10)))  # a CPU decodes in float32
    if torch.cuda.is_available():
        moved = build("llama").to("cuda")
        rollout = TorchEngine(Special(), 8, autocast="bfloat16").generate(moved, prompts, range(8), Sampling(10))
        assert rollout.behaviour_logprobs.dtype == torch.float32 and moved.dtype == torch.float32
        plain = torch.cat([plain_logprobs(moved.cpu(), prompts[r], rollout.response_ids(r)) for r in range(8)])
        assert 1e-4 < float((rollout.behaviour_logprobs[rollout.mask] - plain).abs().mean()) < 0.2  # bfloat16 it was, and not wrong
    half = build("llama").to(torch.bfloat16)
    rollout = TorchEngine(Special(), 8).generate(half, prompts, range(8), Sampling(10))
    assert rollout.behaviour_logprobs.dtype == torch.float32 and rollout.mask.any()


def test_a_diverged_model_is_named(llama: PreTrainedModel) -> None:
    broken = build("llama")
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    with pytest.raises(ModelError, match="prompt 0, response token 1"):
        TorchEngine(Special(), 4).generate(broken, some_prompts(6), range(6), Sampling(5))


def test_eager_attention_too() -> None:
    """The other implementation of attention, which takes masks of another kind (and knows Gemma2's soft cap)."""
    for name in ("llama", "gemma2"):
        model = build(name, attn_implementation="eager")
        assert_plain(model, TorchEngine(Special(), 8).generate(model, some_prompts(8), range(8), Sampling(20)))


def test_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    rollout = TorchEngine(Special(), 8).generate(model, some_prompts(8), range(8), Sampling(12))
    assert_plain(model.eval(), rollout)
    with model.disable_adapter():
        base = TorchEngine(Special(), 8).generate(model, some_prompts(8), range(8), Sampling(12))
    same(base, TorchEngine(Special(), 8).generate(build("llama"), some_prompts(8), range(8), Sampling(12)))
