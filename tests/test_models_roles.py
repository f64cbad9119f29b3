"""What a role is: its own weights, everyone else's untouched, and the model as it was found after each use."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from srppo.errors import ModelError
from srppo.models.roles import Roles
from srppo.records import TokenBatch
from tiny_models import ARCHITECTURES, save_tiny, tiny_roles

KINDS = ["full", "lora"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {a: save_tiny(root / a, a) for a in [*ARCHITECTURES, "llama_tied"]}


def batch(seed: int = 0) -> TokenBatch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, 103, (3, 10), generator=g)
    attention = torch.ones_like(ids)
    attention[1, 7:] = 0
    target = attention.bool() & (torch.arange(10) >= 3)
    return TokenBatch(ids, attention, target)


def set_up(place: str, kind: str, **settings: object) -> Roles:
    """base, sft (moved away from base), policy (a copy of sft), critic."""
    roles = tiny_roles(place, kind, **settings)  # type: ignore[arg-type]
    roles.create("sft", "base")
    train(roles, "sft", steps=2)
    roles.create("policy", "sft")
    roles.create_critic("sft")
    roles.freeze("sft")
    return roles


def train(roles: Roles, role: str, steps: int = 1) -> None:
    optimizer = torch.optim.AdamW(roles.parameters(role).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        with roles.use(role, train=True):
            (-roles.score(role, batch(1), train=True).logprobs.sum()).backward()
        optimizer.step()


def train_critic(roles: Roles, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(roles.critic_parameters().values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        ((roles.values(batch(2), train=True) - 1.5) ** 2).sum().backward()
        optimizer.step()


def surroundings(roles: Roles) -> tuple[list[bool], list[bool], list[object], bool]:
    """All that a use may change and must put back: flags, modes, adapters, grad mode."""
    flags, modes, adapters = [], [], []
    for role in sorted(roles.names()):
        with torch.no_grad():
            model = roles._store.model(role)
        flags += [p.requires_grad for p in model.parameters()]
        modes += [m.training for m in model.modules()]
        adapters += [(m.active_adapters, m.disable_adapters) for m in model.modules() if hasattr(m, "disable_adapters")]
    return flags, modes, adapters, torch.is_grad_enabled()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama_tied"])
def test_roles_keep_to_themselves(places: dict[str, str], architecture: str, kind: str) -> None:
    """The design's promise: after training policy and critic, base and sft are bit-identical to before."""
    place, b = places[architecture], batch()
    original = AutoModelForCausalLM.from_pretrained(place)
    roles = set_up(place, kind)
    at_start = {role: roles.score(role, b).logprobs for role in ("base", "sft", "policy")}
    assert torch.equal(at_start["policy"], at_start["sft"])
    assert not torch.equal(at_start["sft"], at_start["base"])
    assert torch.equal(roles.values(b), torch.zeros(b.targets))
    prints = {role: roles.fingerprint(role) for role in ("base", "sft", "policy")}

    train(roles, "policy", steps=3)
    train_critic(roles)
    assert roles.fingerprint("base") == prints["base"] and roles.fingerprint("sft") == prints["sft"]
    assert roles.fingerprint("policy") != prints["policy"]
    assert torch.equal(roles.score("base", b).logprobs, at_start["base"])
    assert torch.equal(roles.score("sft", b).logprobs, at_start["sft"])
    assert not torch.equal(roles.score("policy", b).logprobs, at_start["policy"])
    assert roles.values(b).abs().min() > 0

    policy, values = roles.score("policy", b).logprobs, roles.values(b)
    train_critic(roles)
    assert torch.equal(roles.score("policy", b).logprobs, policy)
    train(roles, "policy")
    moved = roles.values(b)
    assert not torch.equal(moved, values)
    train(roles, "policy")
    assert torch.equal(roles.values(b), moved)

    with roles.use("base") as model:  # and base is the model of the folder, weight for weight
        ours = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, ours[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_role_scores_as_its_own_plain_forward(places: dict[str, str], architecture: str, kind: str) -> None:
    roles, b = set_up(places[architecture], kind), batch()
    for role in ("base", "sft", "policy"):
        scores = roles.score(role, b, entropy=True)
        with roles.use(role) as model:
            logits = model(input_ids=b.ids, attention_mask=b.attention_mask).logits.double()
        every = logits.log_softmax(-1)[:, :-1]
        chosen = every.gather(-1, b.ids[:, 1:, None]).squeeze(-1)[b.target_mask[:, 1:]]
        torch.testing.assert_close(scores.logprobs.double(), chosen, atol=1e-5, rtol=0)
        assert not scores.logprobs.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_role_in_training_gets_gradients(places: dict[str, str], kind: str) -> None:
    roles, b = set_up(places["qwen2"], kind), batch()
    roles.create("other", "sft")
    (roles.score("policy", b, train=True).logprobs.sum() + roles.score("sft", b).logprobs.sum()).backward()
    roles.score("base", b)
    everyone = {id(p) for role in roles.names() for p in roles._store.model(role).parameters() if p.grad is not None}
    assert everyone == {id(p) for p in roles.parameters("policy").values()}
    assert all(p.grad is None for p in roles.critic_parameters().values())
    roles.values(b, train=True).sum().backward()
    assert all(p.grad is None for p in roles.parameters("other").values())
    # the value head starts at zero, so only the head itself has a gradient that is not zero
    assert roles.critic_parameters()["value_head.weight"].grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_plain_forward(places: dict[str, str], kind: str) -> None:
    roles, b = set_up(places["gemma2"], kind), batch()
    roles.score("policy", b, train=True).logprobs.sum().backward()
    ours = {n: p.grad.clone() for n, p in roles.parameters("policy").items() if p.grad is not None}
    for p in roles.parameters("policy").values():
        p.grad = None
    with roles.use("policy", train=True) as model:
        every = model(input_ids=b.ids, attention_mask=b.attention_mask).logits.log_softmax(-1)[:, :-1]
        every.gather(-1, b.ids[:, 1:, None]).squeeze(-1)[b.target_mask[:, 1:]].sum().backward()
    assert ours.keys() == {n for n, p in roles.parameters("policy").items() if p.grad is not None}
    for name, p in roles.parameters("policy").items():
        if p.grad is not None:
            torch.testing.assert_close(ours[name], p.grad, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_use_puts_everything_back(places: dict[str, str], kind: str) -> None:
    roles = set_up(places["llama"], kind)
    with roles.use("policy") as model:
        model.train()  # a state that no use would choose by itself
        model.get_decoder().layers[1].eval()
        before = surroundings(roles)
        for role in ("base", "sft", "policy"):
            with roles.use(role) as inner:
                assert not torch.is_grad_enabled() and not any(m.training for m in inner.modules())
            assert surroundings(roles) == before
        with roles.use("policy", train=True) as inner:
            assert torch.is_grad_enabled() and inner.training
            with roles.use("base"):
                assert not torch.is_grad_enabled()
            assert torch.is_grad_enabled() and inner.training
        assert surroundings(roles) == before
        with pytest.raises(RuntimeError, match="on purpose"), roles.use("policy", train=True), roles.use("base"):
            raise RuntimeError("on purpose")
        assert surroundings(roles) == before
        roles.values(batch(), train=True)
        roles.create("more", "policy")
        roles.drop("more")
        assert surroundings(roles) == before


def test_nested_uses_act_as_the_innermost(places: dict[str, str]) -> None:
    for kind in KINDS:
        roles, b = set_up(places["llama"], kind), batch()
        train(roles, "policy")
        expected = {role: roles.score(role, b).logprobs for role in ("base", "sft", "policy")}
        assert len({tuple(v.tolist()) for v in expected.values()}) == 3
        with roles.use("policy"), roles.use("base"), roles.use("sft"):
            for role in ("policy", "sft", "base", "policy"):
                assert torch.equal(roles.score(role, b).logprobs, expected[role])


def test_peft_switches_by_hand_are_put_back_too(places: dict[str, str]) -> None:
    """set_adapter asks for gradients and disable_adapter takes them: neither may survive a use."""
    roles, b = set_up(places["llama"], "lora"), batch()
    expected, before = roles.score("base", b).logprobs, surroundings(roles)
    with roles.use("base"):
        peft: PeftModel = roles._store._peft  # type: ignore[attr-defined]
        peft.set_adapter("sft")
        peft.train()
        with peft.disable_adapter():
            pass
    assert surroundings(roles) == before
    assert torch.equal(roles.score("base", b).logprobs, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(places: dict[str, str], kind: str, inside: bool) -> None:
    """Also where the backward pass runs after the use has ended and another role is active: LoRA recomputes the forward pass then."""
    grads = []
    for checkpointing in (False, True):
        roles, b = set_up(places["llama"], kind, gradient_checkpointing=checkpointing), batch()
        train(roles, "policy")
        for p in roles.parameters("policy").values():
            p.grad = None
        calls: list[int] = []
        layer = roles._store.model("policy").get_decoder().layers[0].self_attn  # recomputation stops early, in the mlp
        handle = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if inside:
            with roles.use("policy", train=True):
                roles.score("policy", b, train=True).logprobs.sum().backward()
        else:
            total = roles.score("policy", b, train=True).logprobs.sum()
            with roles.use("base"):
                total.backward()
        handle.remove()
        assert len(calls) == (2 if checkpointing else 1)
        grads.append({n: p.grad for n, p in roles.parameters("policy").items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_states_restore_exactly(places: dict[str, str], kind: str) -> None:
    roles, b = set_up(places["llama_tied"], kind), batch()
    train_critic(roles)
    state, critic = roles.state("policy"), roles.critic_state()
    before, values, print_before = roles.score("policy", b).logprobs, roles.values(b), roles.fingerprint("policy")
    train(roles, "policy")
    train_critic(roles)
    assert not torch.equal(roles.score("policy", b).logprobs, before) and not torch.equal(roles.values(b), values)
    roles.load_state("policy", state)
    roles.load_critic_state(critic)
    assert torch.equal(roles.score("policy", b).logprobs, before) and torch.equal(roles.values(b), values)
    assert roles.fingerprint("policy") == print_before
    fresh = set_up(places["llama_tied"], kind)  # another process, resuming
    fresh.load_state("policy", state)
    fresh.load_critic_state(critic)
    assert torch.equal(fresh.score("policy", b).logprobs, before) and torch.equal(fresh.values(b), values)
    with pytest.raises(ModelError, match="names differ"):
        roles.load_state("policy", dict(list(state.items())[1:]))
    with pytest.raises(ModelError, match="do not fit"):
        roles.load_state("policy", {n: t[..., :1] for n, t in state.items()})
    assert torch.equal(roles.score("policy", b).logprobs, before)
    with pytest.raises(ModelError, match="never changed"):
        roles.load_state("base", roles.state("base"))


def test_a_state_is_a_snapshot(places: dict[str, str]) -> None:
    for kind in KINDS:
        roles = set_up(places["llama"], kind)
        state = roles.state("policy")
        kept = {n: t.clone() for n, t in state.items()}
        train(roles, "policy")
        assert all(torch.equal(state[n], kept[n]) for n in kept)


def test_tied_embeddings_stay_tied_in_copies(places: dict[str, str]) -> None:
    roles = set_up(places["llama_tied"], "full")
    for role in roles.names():
        model = roles._store.model(role)
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in roles.state("policy")


def test_the_critic_has_no_copy_of_the_head(places: dict[str, str]) -> None:
    roles = set_up(places["llama"], "full")
    vocabulary_sized = [n for n, p in roles.critic_parameters().items() if 103 in p.shape]
    assert vocabulary_sized == ["trunk.embed_tokens.weight"]
    assert {p.dtype for n, p in roles.critic_parameters().items() if n.startswith("value_head")} == {torch.float32}


def test_values_are_those_of_the_states_before_the_targets(places: dict[str, str]) -> None:
    """A value head that reads one state coordinate must return that coordinate one position before each target."""
    for kind in KINDS:
        roles, b = set_up(places["llama"], kind), batch()
        with torch.no_grad():
            roles.critic_parameters()["value_head.weight"][0, 5] = 1.0
            roles.critic_parameters()["value_head.bias"][0] = 0.25
        with roles.use("sft") as model:  # the critic's trunk is still a copy of sft's
            states = model.get_decoder()(input_ids=b.ids, attention_mask=b.attention_mask).last_hidden_state
        expected = [states[r, c - 1, 5] + 0.25 for r, c in b.target_mask.nonzero().tolist()]
        torch.testing.assert_close(roles.values(b), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_lora_keeps_one_base_in_memory(places: dict[str, str]) -> None:
    roles = set_up(places["llama"], "lora")
    models = {id(roles._store.model(role)) for role in roles.names()}
    assert len(models) == 1
    own = sum(t.numel() for t in roles._store.tensors("policy").values())
    total = sum(p.numel() for p in roles._store.model("base").parameters())
    base = sum(t.numel() for t in roles._store.tensors("base").values())
    assert total == base + 3 * own  # sft, policy, critic


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(places: dict[str, str]) -> None:
    def first(seed: int, noise: int) -> Tensor:
        torch.manual_seed(noise)
        roles = tiny_roles(places["llama"], "lora", seed=seed)
        roles.create("sft", "base")
        assert torch.equal(roles.score("sft", batch()).logprobs, roles.score("base", batch()).logprobs)
        return torch.cat([t.flatten() for n, t in roles.state("sft").items() if "lora_A" in n])

    assert torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


def test_lora_dropout_acts_in_training_only(places: dict[str, str]) -> None:
    roles, b = set_up(places["llama"], "lora", lora={"lora_dropout": 0.5}), batch()
    assert torch.equal(roles.score("policy", b).logprobs, roles.score("policy", b).logprobs)
    a, c = (roles.score("policy", b, train=True).logprobs for _ in range(2))
    assert not torch.equal(a, c)


def test_an_adapter_on_the_head_is_scored_right(places: dict[str, str]) -> None:
    """The probe runs before any adapter exists; an adapted head must not be read as a plain weight."""
    roles, b = set_up(places["llama"], "lora", lora={"lora_targets": ["q_proj", "lm_head"]}), batch()
    train(roles, "policy", 3)
    assert any("lm_head" in n and p.abs().sum() > 0 for n, p in roles.parameters("policy").items() if "lora_B" in n)
    scores = roles.score("policy", b).logprobs
    with roles.use("policy") as model:
        every = model(input_ids=b.ids).logits.log_softmax(-1)[:, :-1]
    torch.testing.assert_close(scores, every.gather(-1, b.ids[:, 1:, None]).squeeze(-1)[b.target_mask[:, 1:]], atol=1e-5, rtol=0)


def test_frozen_copies_may_be_of_lower_precision(places: dict[str, str]) -> None:
    roles, b = set_up(places["llama"], "full", frozen_dtype="bfloat16"), batch()
    exact = tiny_roles(places["llama"], "full")
    dtypes = {role: {p.dtype for p in roles._store.model(role).parameters()} for role in roles.names()}
    assert dtypes == {"base": {torch.bfloat16}, "sft": {torch.bfloat16}, "policy": {torch.float32}}
    again = tiny_roles(places["llama"], "full", frozen_dtype="bfloat16")
    again.create("sft", "base")  # from the file, not from the rounded base
    assert torch.equal(again.score("sft", b).logprobs, exact.score("base", b).logprobs)
    as_loaded = AutoModelForCausalLM.from_pretrained(places["llama"], dtype=torch.bfloat16)
    again.freeze("sft")
    with torch.no_grad(), again.use("sft") as model:
        assert torch.equal(model(input_ids=b.ids).logits, as_loaded(input_ids=b.ids).logits)
    assert roles.score("base", b).logprobs.dtype == torch.float32


def test_roles_refuse_what_makes_no_sense(places: dict[str, str]) -> None:
    for kind in KINDS:
        roles = set_up(places["llama"], kind)
        assert roles.names() == {"base", "sft", "policy"} and roles.has("critic") and roles.has_critic and not roles.has("other")
        assert roles.parameters("base") == {} and roles.parameters("sft") == {}
        refused = [
            (lambda r: r.create("policy", "sft"), "exists already"),
            (lambda r: r.create("new", "nobody"), "no role 'nobody'"),
            (lambda r: r.create("critic2.x", "sft"), "cannot be the name"),
            (lambda r: r.create_critic("sft"), "exists already"),
            (lambda r: r.score("nobody", batch()), "no role"),
            (lambda r: r.score("base", batch(), train=True), "frozen"),
            (lambda r: r.score("sft", batch(), train=True), "frozen"),
            (lambda r: r.drop("base"), "cannot be dropped"),
        ]
        for act, message in refused:
            with pytest.raises(ModelError, match=message):
                act(roles)
        roles.drop("policy")
        assert roles.names() == {"base", "sft"}
    with pytest.raises(ModelError, match="part of the model"):
        roles.create("layers", "base")
    with pytest.raises(ModelError, match="no critic yet"):
        tiny_roles(places["llama"]).values(batch())


def test_the_last_adapter_can_go_and_come_back(places: dict[str, str]) -> None:
    roles, b = tiny_roles(places["llama"], "lora"), batch()
    expected = roles.score("base", b).logprobs
    for _ in range(2):
        roles.create("sft", "base")
        train(roles, "sft")
        roles.drop("sft")
        assert roles.names() == {"base"} and torch.equal(roles.score("base", b).logprobs, expected)
        assert not any("lora" in n for n, _ in roles._store.model("base").named_parameters())
