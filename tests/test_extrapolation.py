"""Extrapolation of logits against a slow twin that runs the models on whole sequences, of weights against sums by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from srppo.errors import ConfigError, DataError, ModelError
from srppo.models.roles import Roles
from srppo.records import Rollout
from srppo.rollout import decode as decode_module
from srppo.rollout.engine import Sampling
from srppo.rollout.extrapolation import generate_extrapolated
from srppo.rollout.torch_engine import TorchEngine
from tiny_models import VOCABULARY, save_tiny, standard_roles, tiny_batch, tiny_roles, tiny_tokenizer, train_role

KINDS = ["full", "lora"]
ARCHITECTURES = ["llama", "gpt2", "mistral", "gemma2"]  # the last two with windows of 4 tokens
CASES = [f"{a}-{k}" for a, k in product(ARCHITECTURES, KINDS)]
RECURRENT = {  # a state instead of keys, in caches that cannot be joined
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
    "mlp_only_layers": [0, 1],
    "initializer_range": 0.2,
    "max_position_embeddings": 96,
}
BETA = 0.7


@dataclass(frozen=True)
class Special:
    pad_id: int = 0
    eos_ids: tuple[int, ...] = (3, 7, 11, 40, 41, 42, 77, 90)


class Shelf:
    """Folders and roles, made when first asked for. The roles are not to be changed."""

    def __init__(self, root: object):
        self.root, self.made = root, dict[str, Roles]()

    def place(self, architecture: str) -> str:
        folder = f"{self.root}/{architecture}"
        return save_tiny(folder, architecture, spread=0.25, **{"n_positions" if architecture == "gpt2" else "max_position_embeddings": 96})

    def roles(self, case: str) -> Roles:
        if case not in self.made:
            architecture, kind = case.split("-")
            self.made[case] = standard_roles(self.place(architecture), kind)
            train_role(self.made[case], "policy")
        return self.made[case]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("models"))


@pytest.fixture(params=CASES)
def roles(request: pytest.FixtureRequest, shelf: Shelf) -> Roles:
    return shelf.roles(request.param)


def some_prompts(count: int = 12, seed: int = 0) -> list[list[int]]:
    """Lengths 1 to 14, each prompt twice (not side by side)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 15, (count // 2,), generator=generator).tolist()
    half = [torch.randint(12, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return half + half


def sample(roles: Roles, prompts: list[list[int]], seeds: object, sampling: Sampling, batch_size: int = 12, **options: object) -> Rollout:
    engine = TorchEngine(Special(), batch_size)
    return generate_extrapolated(roles, prompts, list(seeds), sampling, engine=engine, **{"beta": BETA, **options})  # type: ignore


def twin(roles: Roles, ids: Tensor, beta: float = BETA, start: str = "sft", numerator: str = "sft") -> Tensor:
    """[R, L, V] float64: the formula, over whole unpadded sequences [R, L] and without a cache."""
    found = {}
    for role in {start, numerator, "base"}:
        with roles.use(role) as model:
            found[role] = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    return (found[start] + (found[numerator] - found["base"]) / beta).log_softmax(-1)


def assert_twin(roles: Roles, rollout: Rollout, greedy: bool = False, **options: object) -> None:
    for row, prompt in enumerate(rollout.prompt_ids):
        response = torch.tensor(rollout.response_ids(row))
        expected = twin(roles, torch.tensor([prompt + response.tolist()]), **options)[0, len(prompt) - 1 : -1]  # type: ignore[arg-type]
        chosen = expected.gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(rollout.behaviour_logprobs[row][rollout.mask[row]].double(), chosen, atol=5e-4, rtol=0)
        assert not greedy or torch.equal(response, expected.argmax(-1))


def same(a: Rollout, b: Rollout, rows: list[int] | None = None) -> None:
    """Row i of a is row rows[i] of b, to float rounding."""
    for i, r in enumerate(rows or range(len(a.prompt_ids))):
        assert a.prompt_ids[i] == b.prompt_ids[r] and a.response_ids(i) == b.response_ids(r) and a.ended[i] == b.ended[r]
        torch.testing.assert_close(a.behaviour_logprobs[i][a.mask[i]], b.behaviour_logprobs[r][b.mask[r]], atol=5e-4, rtol=0)


def weights_of(roles: Roles, role: str) -> dict[str, Tensor]:
    with roles.use(role) as model:
        return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


# --- logits


def test_logprobs_are_the_twins(roles: Roles) -> None:
    prompts = some_prompts()
    rollout = sample(roles, prompts, range(12), Sampling(24), prompt_index=[5] * 12)
    assert rollout.prompt_ids == prompts and rollout.prompt_index == [5] * 12
    assert len(set(rollout.lengths.tolist())) > 3 and rollout.ended.any()  # rows left at different steps
    assert int((rollout.lengths + torch.tensor([len(p) for p in prompts])).max()) > 16  # far past the windows
    assert_twin(roles, rollout)
    plain = twin(roles, torch.tensor([prompts[0]]), beta=torch.inf)
    assert (twin(roles, torch.tensor([prompts[0]])) - plain).abs().max() > 0.2  # another distribution than sft's
    assert_twin(roles, sample(roles, prompts[:6], range(6), Sampling(10, greedy=True)), greedy=True)
    assert_twin(roles, sample(roles, prompts[:6], range(6), Sampling(6, temperature=0.5, top_k=9)))


def test_other_batches_give_the_same_rows(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seeds = some_prompts(), list(range(100, 112))
    whole = sample(roles, prompts, seeds, Sampling(16))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    for rows, batch_size in ((order, 5), (order[:2], 1)):
        same(sample(roles, [prompts[r] for r in rows], [seeds[r] for r in rows], Sampling(16), batch_size), whole, rows)
    other = sample(roles, prompts, [s + 1 for s in seeds], Sampling(16))
    assert sum(other.response_ids(r) != whole.response_ids(r) for r in range(12)) > 6
    monkeypatch.setattr(decode_module, "PREFILL_TOKENS", 20)  # prompts read in several passes
    monkeypatch.setattr(decode_module, "checks_every", lambda device: 8)  # as on a GPU
    same(sample(roles, prompts, seeds, Sampling(16)), whole)


def test_a_large_beta_is_the_start(roles: Roles) -> None:
    prompts = some_prompts()
    with roles.use("sft") as model:
        plain = TorchEngine(Special(), 12).generate(model, prompts, range(12), Sampling(12))
    infinite = sample(roles, prompts, range(12), Sampling(12), beta=torch.inf)
    assert torch.equal(infinite.responses, plain.responses) and torch.equal(infinite.behaviour_logprobs, plain.behaviour_logprobs)
    same(sample(roles, prompts, range(12), Sampling(12), beta=1e7), plain)


@pytest.mark.parametrize("case", ["llama-full", "llama-lora"])
def test_frequencies_are_the_twins_probabilities(shelf: Shelf, case: str) -> None:
    roles, prompt, draws = shelf.roles(case), [20, 30, 45], 4000
    first = twin(roles, torch.tensor([prompt]))[0, -1].exp()
    second = twin(roles, torch.tensor([[*prompt, t] for t in range(VOCABULARY)]))[:, -1].exp()
    exact = {(t,): float(first[t]) for t in Special().eos_ids}
    exact |= {(t, u): float(first[t] * second[t, u]) for t in range(VOCABULARY) if (t,) not in exact for u in range(VOCABULARY)}
    rollout = sample(roles, [prompt] * draws, range(draws), Sampling(2), draws)
    counts = Counter(tuple(rollout.response_ids(r)) for r in range(draws))
    assert set(counts) <= set(exact) and sum(exact.values()) == pytest.approx(1, abs=1e-6)
    common = [r for r, p in exact.items() if p * draws >= 5]
    observed = [counts[r] for r in common] + [draws - sum(counts[r] for r in common)]
    expected = [exact[r] * draws for r in common] + [draws * (1 - sum(exact[r] for r in common))]
    assert len(common) > 10
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_start_and_numerator_may_differ(shelf: Shelf, kind: str) -> None:
    roles, prompts = shelf.roles(f"llama-{kind}"), some_prompts()
    rollout = sample(roles, prompts, range(12), Sampling(8), start="policy", numerator="sft")
    assert_twin(roles, rollout, start="policy", numerator="sft")
    rollout = sample(roles, prompts, range(12), Sampling(8), start="base", numerator="sft", beta=2.0)
    assert_twin(roles, rollout, start="base", numerator="sft", beta=2.0)


def test_models_of_different_depths_and_positions(shelf: Shelf, tmp_path: object) -> None:
    """In full tuning sft may be of another architecture than base."""
    roles = tiny_roles(shelf.place("llama"))
    roles.load("sft", save_tiny(f"{tmp_path}/sft", "mistral", seed=1, num_hidden_layers=3, max_position_embeddings=64))
    assert_twin(roles, sample(roles, some_prompts(), range(12), Sampling(10)))
    with pytest.raises(DataError, match="exceeds the model's 64 positions"):
        sample(roles, [[20] * 61], [0], Sampling(4))
    with pytest.raises(ModelError, match="another architecture"):
        roles.extrapolate("far", "sft", 1.0)
    assert not roles.has("far")


def test_recurrent_layers(tmp_path: object) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3NextConfig(vocab_size=VOCABULARY, **RECURRENT)).save_pretrained(f"{tmp_path}")
    tiny_tokenizer().save_pretrained(f"{tmp_path}")
    roles = standard_roles(f"{tmp_path}", "full")
    assert_twin(roles, sample(roles, some_prompts(), range(12), Sampling(10)))


@pytest.mark.parametrize("kind", KINDS)
def test_roles_are_left_as_they_were(shelf: Shelf, kind: str) -> None:
    def surroundings() -> list[object]:
        models = [roles._store.model(role) for role in sorted(roles.names())]
        modules = [m for model in models for m in model.modules()]
        adapters = [(list(m.active_adapters), m.disable_adapters) for m in modules if isinstance(m, BaseTunerLayer)]
        kernels = [model.config._attn_implementation for model in models]
        flags = [(p.requires_grad, p.grad is None) for model in models for p in model.parameters()]
        return [flags, [m.training for m in modules], adapters, kernels, torch.is_grad_enabled()]

    def boom(done: int, total: int) -> None:
        raise RuntimeError("boom")

    roles = shelf.roles(f"llama-{kind}")
    prints = {role: roles.fingerprint(role) for role in roles.names()}
    with roles.use("policy", train=True) as model:
        model.get_decoder().layers[1].eval()  # a state that no use would choose by itself
        before = surroundings()
        seen: list[tuple[int, int]] = []
        sample(roles, some_prompts(), range(12), Sampling(9), 5, on_progress=lambda done, total: seen.append((done, total)))
        assert surroundings() == before and seen[-1] == (12, 12)
        with pytest.raises(RuntimeError, match="boom"):
            sample(roles, some_prompts(), range(12), Sampling(9), on_progress=boom)
        assert surroundings() == before
    assert {role: roles.fingerprint(role) for role in roles.names()} == prints


def test_what_cannot_be_sampled(shelf: Shelf) -> None:
    roles = shelf.roles("llama-lora")
    for beta in (0.0, -1.0, torch.nan):
        with pytest.raises(ConfigError, match="beta is"):
            sample(roles, [[20]], [0], Sampling(1), beta=beta)
    with pytest.raises(ModelError, match="base cannot be extrapolated"):
        sample(roles, [[20]], [0], Sampling(1), start="base")
    with pytest.raises(ModelError, match="no role 'nobody'"):
        sample(roles, [[20]], [0], Sampling(1), start="nobody")


# --- weights


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "gemma2"])
def test_full_weights_are_the_sum_by_hand(shelf: Shelf, architecture: str) -> None:
    roles = standard_roles(shelf.place(architecture), "full")
    base, sft = weights_of(roles, "base"), weights_of(roles, "sft")
    prints = {role: roles.fingerprint(role) for role in ("base", "sft", "policy")}
    roles.extrapolate("far", "sft", 1.5)
    far = weights_of(roles, "far")
    assert far.keys() == sft.keys()
    for name, weight in far.items():
        torch.testing.assert_close(weight.double(), sft[name].double() * 2.5 - base[name].double() * 1.5, atol=1e-6, rtol=0)
    assert all(not torch.equal(far[n], sft[n]) for n in far if "embed_positions" not in n and "wpe" not in n)
    with roles.use("far") as model:
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (architecture != "llama")
    roles.extrapolate("near", "sft", 0.0)
    assert all(torch.equal(weight, sft[name]) for name, weight in weights_of(roles, "near").items())
    train_role(roles, "far")
    assert {role: roles.fingerprint(role) for role in prints} == prints


def test_full_weights_of_rounded_copies(shelf: Shelf) -> None:
    place = shelf.place("llama")
    exact = dict(AutoModelForCausalLM.from_pretrained(place).named_parameters())
    roles = tiny_roles(place, "full", frozen_dtype="bfloat16")
    roles.create("sft", "base")
    train_role(roles, "sft", steps=2)
    sft = weights_of(roles, "sft")
    roles.extrapolate("far", "sft", 1.5)  # from the base before it was rounded
    for name, weight in weights_of(roles, "far").items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), sft[name].double() * 2.5 - exact[name].double() * 1.5, atol=1e-6, rtol=0)
    roles.freeze("sft")
    base, sft = weights_of(roles, "base"), weights_of(roles, "sft")
    roles.extrapolate("farther", "sft", 1.5)  # both rounded: float32 sums of what is there
    for name, weight in weights_of(roles, "farther").items():
        assert weight.dtype == torch.float32 and sft[name].dtype == base[name].dtype == torch.bfloat16
        torch.testing.assert_close(weight.double(), sft[name].double() * 2.5 - base[name].double() * 1.5, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", "all-linear"), ("gpt2", "all-linear"), ("llama", ["v_proj", "embed_tokens"])]
)
def test_lora_is_the_full_model_merged_by_hand(shelf: Shelf, architecture: str, targets: object) -> None:
    place, b, scale, alpha = shelf.place(architecture), tiny_batch(), 8.0 / 4, 1.5
    roles = standard_roles(place, "lora", lora={"lora_targets": targets})
    prints = {role: roles.fingerprint(role) for role in ("base", "sft", "policy")}
    adapter = roles.state("sft")
    merged = AutoModelForCausalLM.from_pretrained(place).eval()
    with torch.no_grad():
        for module in {name.split(".lora_")[0] for name in adapter}:
            kind, end = ("lora_embedding_", "") if "embed" in module else ("lora_", ".weight")
            change = adapter[f"{module}.{kind}B{end}"] @ adapter[f"{module}.{kind}A{end}"]
            weight = merged.get_parameter(f"{module}.weight")
            weight += (1 + alpha) * scale * (change if kind == "lora_" and architecture != "gpt2" else change.T)
        expected = merged(input_ids=b.ids, attention_mask=b.attention_mask).logits
    roles.extrapolate("far", "sft", alpha)
    roles.extrapolate("near", "sft", 0.0)
    with roles.use("far") as model:
        logits = model(input_ids=b.ids, attention_mask=b.attention_mask).logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert (roles.score("far", b).logprobs - roles.score("sft", b).logprobs).abs().max() > 0.1
    assert roles.fingerprint("near") == prints["sft"]
    train_role(roles, "far")
    assert {role: roles.fingerprint(role) for role in prints} == prints


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_extrapolated(shelf: Shelf, kind: str) -> None:
    roles = shelf.roles(f"llama-{kind}")
    for arguments, message in (
        (("far", "base", 1.0), "base cannot be extrapolated"),
        (("far", "critic", 1.0), "critic cannot be extrapolated"),
        (("policy", "sft", 1.0), "'policy' exists already"),
        (("far", "nobody", 1.0), "no role 'nobody'"),
        (("far", "sft", torch.inf), "alpha inf"),
    ):
        with pytest.raises(ModelError, match=message):
            roles.extrapolate(*arguments)  # type: ignore[arg-type]
    assert not roles.has("far")
