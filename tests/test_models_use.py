"""Acting as a role: its own scores, its own gradients, and the model as it was found after each use."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from srppo.models.roles import Roles
from tiny_models import ARCHITECTURES, save_tiny, standard_roles, tiny_batch, train_role

KINDS = ["full", "lora"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {a: save_tiny(root / a, a) for a in [*ARCHITECTURES, "llama_tied"]}


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
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_role_scores_as_its_own_plain_forward(places: dict[str, str], architecture: str, kind: str) -> None:
    roles, b = standard_roles(places[architecture], kind), tiny_batch()
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
    roles, b = standard_roles(places["qwen2"], kind), tiny_batch()
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
    roles, b = standard_roles(places["gemma2"], kind), tiny_batch()
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
    roles = standard_roles(places["llama"], kind)
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
        roles.values(tiny_batch(), train=True)
        roles.create("more", "policy")
        roles.drop("more")
        assert surroundings(roles) == before


def test_nested_uses_act_as_the_innermost(places: dict[str, str]) -> None:
    for kind in KINDS:
        roles, b = standard_roles(places["llama"], kind), tiny_batch()
        train_role(roles, "policy")
        expected = {role: roles.score(role, b).logprobs for role in ("base", "sft", "policy")}
        assert len({tuple(v.tolist()) for v in expected.values()}) == 3
        with roles.use("policy"), roles.use("base"), roles.use("sft"):
            for role in ("policy", "sft", "base", "policy"):
                assert torch.equal(roles.score(role, b).logprobs, expected[role])


def test_peft_switches_by_hand_are_put_back_too(places: dict[str, str]) -> None:
    """set_adapter asks for gradients and disable_adapter takes them: neither may survive a use."""
    roles, b = standard_roles(places["llama"], "lora"), tiny_batch()
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
        roles, b = standard_roles(places["llama"], kind, gradient_checkpointing=checkpointing), tiny_batch()
        train_role(roles, "policy")
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


def test_lora_dropout_acts_in_training_only(places: dict[str, str]) -> None:
    roles, b = standard_roles(places["llama"], "lora", lora={"lora_dropout": 0.5}), tiny_batch()
    assert torch.equal(roles.score("policy", b).logprobs, roles.score("policy", b).logprobs)
    a, c = (roles.score("policy", b, train=True).logprobs for _ in range(2))
    assert not torch.equal(a, c)


def test_an_adapter_on_the_head_is_scored_right(places: dict[str, str]) -> None:
    """The probe runs before any adapter exists; an adapted head must not be read as a plain weight."""
    roles, b = standard_roles(places["llama"], "lora", lora={"lora_targets": ["q_proj", "lm_head"]}), tiny_batch()
    train_role(roles, "policy", 3)
    assert any("lm_head" in n and p.abs().sum() > 0 for n, p in roles.parameters("policy").items() if "lora_B" in n)
    scores = roles.score("policy", b).logprobs
    with roles.use("policy") as model:
        every = model(input_ids=b.ids).logits.log_softmax(-1)[:, :-1]
    torch.testing.assert_close(scores, every.gather(-1, b.ids[:, 1:, None]).squeeze(-1)[b.target_mask[:, 1:]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_roles_may_learn_from_one_backward_pass(places: dict[str, str], kind: str) -> None:
    """Switching adapters must not take the requires_grad flags from the role whose graph is still waiting, as PEFT alone would."""
    roles, b = standard_roles(places["llama"], kind), tiny_batch()
    roles.create("other", "policy")
    with roles.use("policy", train=True):
        one = roles.score("policy", b, train=True).logprobs.sum()
        with roles.use("other", train=True):
            (one + roles.score("other", b, train=True).logprobs.sum() + roles.values(b, train=True).sum()).backward()
    gradients = [{n: p.grad for n, p in roles.parameters(role).items() if p.grad is not None} for role in ("policy", "other")]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 0
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name])
    assert roles.critic_parameters()["value_head.weight"].grad is not None
    with roles.use("sft"):
        assert not any(p.requires_grad for p in roles._store.tensors("sft").values())
