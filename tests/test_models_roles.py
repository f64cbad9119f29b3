"""What a role is: its own weights, and everyone else's untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from srppo.errors import ModelError
from srppo.models.roles import Roles
from tiny_models import ARCHITECTURES, save_tiny, standard_roles, tiny_batch, tiny_roles, train_role

KINDS = ["full", "lora"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {a: save_tiny(root / a, a) for a in [*ARCHITECTURES, "llama_tied"]}


def train_critic(roles: Roles, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(roles.critic_parameters().values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        ((roles.values(tiny_batch(2), train=True) - 1.5) ** 2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama_tied"])
def test_roles_keep_to_themselves(places: dict[str, str], architecture: str, kind: str) -> None:
    """The design's promise: after training policy and critic, base and sft are bit-identical to before."""
    place, b = places[architecture], tiny_batch()
    original = AutoModelForCausalLM.from_pretrained(place)
    roles = standard_roles(place, kind)
    at_start = {role: roles.score(role, b).logprobs for role in ("base", "sft", "policy")}
    assert torch.equal(at_start["policy"], at_start["sft"])
    assert not torch.equal(at_start["sft"], at_start["base"])
    assert torch.equal(roles.values(b), torch.zeros(b.targets))
    prints = {role: roles.fingerprint(role) for role in ("base", "sft", "policy")}

    train_role(roles, "policy", steps=3)
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
    train_role(roles, "policy")
    moved = roles.values(b)
    assert not torch.equal(moved, values)
    train_role(roles, "policy")
    assert torch.equal(roles.values(b), moved)

    with roles.use("base") as model:  # and base is the model of the folder, weight for weight
        ours = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, ours[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_states_restore_exactly(places: dict[str, str], kind: str) -> None:
    roles, b = standard_roles(places["llama_tied"], kind), tiny_batch()
    train_critic(roles)
    state, critic = roles.state("policy"), roles.critic_state()
    before, values, print_before = roles.score("policy", b).logprobs, roles.values(b), roles.fingerprint("policy")
    train_role(roles, "policy")
    train_critic(roles)
    assert not torch.equal(roles.score("policy", b).logprobs, before) and not torch.equal(roles.values(b), values)
    roles.load_state("policy", state)
    roles.load_critic_state(critic)
    assert torch.equal(roles.score("policy", b).logprobs, before) and torch.equal(roles.values(b), values)
    assert roles.fingerprint("policy") == print_before
    fresh = standard_roles(places["llama_tied"], kind)  # another process, resuming
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
        roles = standard_roles(places["llama"], kind)
        state = roles.state("policy")
        kept = {n: t.clone() for n, t in state.items()}
        train_role(roles, "policy")
        assert all(torch.equal(state[n], kept[n]) for n in kept)


def test_tied_embeddings_stay_tied_in_copies(places: dict[str, str]) -> None:
    roles = standard_roles(places["llama_tied"], "full")
    for role in roles.names():
        model = roles._store.model(role)
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in roles.state("policy")


def test_the_critic_has_no_copy_of_the_head(places: dict[str, str]) -> None:
    roles = standard_roles(places["llama"], "full")
    vocabulary_sized = [n for n, p in roles.critic_parameters().items() if 103 in p.shape]
    assert vocabulary_sized == ["trunk.embed_tokens.weight"]
    assert {p.dtype for n, p in roles.critic_parameters().items() if n.startswith("value_head")} == {torch.float32}


def test_values_are_those_of_the_states_before_the_targets(places: dict[str, str]) -> None:
    """A value head that reads one state coordinate must return that coordinate one position before each target."""
    for kind in KINDS:
        roles, b = standard_roles(places["llama"], kind), tiny_batch()
        with torch.no_grad():
            roles.critic_parameters()["value_head.weight"][0, 5] = 1.0
            roles.critic_parameters()["value_head.bias"][0] = 0.25
        with roles.use("sft") as model:  # the critic's trunk is still a copy of sft's
            states = model.get_decoder()(input_ids=b.ids, attention_mask=b.attention_mask).last_hidden_state
        expected = [states[r, c - 1, 5] + 0.25 for r, c in b.target_mask.nonzero().tolist()]
        torch.testing.assert_close(roles.values(b), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_lora_keeps_one_base_in_memory(places: dict[str, str]) -> None:
    roles = standard_roles(places["llama"], "lora")
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
        assert torch.equal(roles.score("sft", tiny_batch()).logprobs, roles.score("base", tiny_batch()).logprobs)
        return torch.cat([t.flatten() for n, t in roles.state("sft").items() if "lora_A" in n])

    assert torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


def test_frozen_copies_may_be_of_lower_precision(places: dict[str, str]) -> None:
    roles, b = standard_roles(places["llama"], "full", frozen_dtype="bfloat16"), tiny_batch()
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
        roles = standard_roles(places["llama"], kind)
        assert roles.names() == {"base", "sft", "policy"} and roles.has("critic") and roles.has_critic and not roles.has("other")
        assert roles.parameters("base") == {} and roles.parameters("sft") == {}
        refused = [
            (lambda r: r.create("policy", "sft"), "exists already"),
            (lambda r: r.create("new", "nobody"), "no role 'nobody'"),
            (lambda r: r.create("critic2.x", "sft"), "cannot be the name"),
            (lambda r: r.create_critic("sft"), "exists already"),
            (lambda r: r.score("nobody", tiny_batch()), "no role"),
            (lambda r: r.score("base", tiny_batch(), train=True), "frozen"),
            (lambda r: r.score("sft", tiny_batch(), train=True), "frozen"),
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
        tiny_roles(places["llama"]).values(tiny_batch())


def test_the_last_adapter_can_go_and_come_back(places: dict[str, str]) -> None:
    roles, b = tiny_roles(places["llama"], "lora"), tiny_batch()
    expected = roles.score("base", b).logprobs
    for _ in range(2):
        roles.create("sft", "base")
        train_role(roles, "sft")
        roles.drop("sft")
        assert roles.names() == {"base"} and torch.equal(roles.score("base", b).logprobs, expected)
        assert not any("lora" in n for n, _ in roles._store.model("base").named_parameters())
