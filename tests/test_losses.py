"""losses/ against the lines of TRL's trainer, torch's cross entropy, closed forms and finite differences."""

from __future__ import annotations

import importlib
import inspect
import math
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from srppo.logprobs import token_logprobs
from srppo.losses import clipped_surrogate, clipped_value_loss, cross_entropy
from srppo.records import LossOutput

N = 40


def random(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def surrogate_case() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities up to far past the clip on both sides, advantages of both signs."""
    old = -random(0).abs() - 2
    return (old + random(1, 0.4)).requires_grad_(), old.requires_grad_(), random(2).requires_grad_()


def value_case() -> tuple[Tensor, Tensor, Tensor]:
    old = random(3)
    values, returns = old + random(4, 0.4), old + random(5, 0.5)
    return values.requires_grad_(), old.requires_grad_(), returns.requires_grad_()


CASES: dict[str, tuple[Callable[..., LossOutput], Callable[[], tuple[Tensor, Tensor, Tensor]]]] = {
    "surrogate": (clipped_surrogate, surrogate_case),
    "value": (clipped_value_loss, value_case),
}


def run_trl(names: dict[str, Any]) -> SimpleNamespace:
    """Execute the loss lines of TRL's PPO trainer (its arithmetic has no function), with one row of N tokens and nothing masked."""
    ppo = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    lines = inspect.getsource(ppo.PPOTrainer.train).splitlines()
    at = [[i for i, line in enumerate(lines) if line.strip().startswith(s)] for s in ("vpredclipped =", "pg_loss = masked_mean")]
    unmasked = torch.zeros(1, N, dtype=torch.bool)
    scope = names | {"padding_mask": unmasked, "padding_mask_p1": unmasked, "micro_batch_inds": slice(None)}
    scope |= {"torch": torch, "masked_mean": ppo.masked_mean, "args": SimpleNamespace(cliprange=0.2, cliprange_value=0.3)}
    exec(textwrap.dedent("\n".join(lines[at[0][0] : at[1][0] + 1])), scope)
    return SimpleNamespace(**scope)


def test_both_clipped_losses_equal_trls_times_the_number_of_tokens() -> None:
    logprobs, old, advantages = surrogate_case()
    values, old_values, returns = value_case()
    names = {"new_logprobs": logprobs, "mb_logprobs": old, "mb_advantage": advantages}
    names |= {"vpred": values, "mb_values": old_values, "mb_return": returns}
    theirs = run_trl({k: v.unsqueeze(0) for k, v in names.items()})

    ours = clipped_surrogate(logprobs, old, advantages, clip=0.2)
    torch.testing.assert_close(ours.loss, theirs.pg_loss * N)
    torch.testing.assert_close(torch.autograd.grad(ours.loss, logprobs), torch.autograd.grad(theirs.pg_loss * N, logprobs))
    assert ours.metrics["clipfrac"].item() == (theirs.pg_losses2 > theirs.pg_losses).sum().item() > 5
    torch.testing.assert_close(ours.metrics["approxkl"], 0.5 * (theirs.logprobs_diff.detach() ** 2).sum())
    torch.testing.assert_close(ours.metrics["ratio"], theirs.ratio.detach().sum())

    ours = clipped_value_loss(values, old_values, returns, clip=0.3)
    torch.testing.assert_close(ours.loss, theirs.vf_loss * N)
    torch.testing.assert_close(torch.autograd.grad(ours.loss, values), torch.autograd.grad(theirs.vf_loss * N, values))
    torch.testing.assert_close(ours.metrics["clipfrac"], theirs.vf_clipfrac.double() * N)
    assert ours.metrics["clipfrac"] > 3
    torch.testing.assert_close(ours.metrics["error"], theirs.vf_losses1.detach().sum())


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_finite_differences(name: str) -> None:
    loss, case = CASES[name]
    x, *rest = case()
    assert torch.autograd.gradcheck(lambda y: loss(y, *[r.detach() for r in rest], 0.2).loss, (x,))


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_the_first_argument_alone_and_metrics_none(name: str) -> None:
    loss, case = CASES[name]
    tensors = case()
    out = loss(*tensors, 0.2)
    out.loss.backward()
    assert [t.grad is not None for t in tensors] == [True, False, False]
    assert out.loss.shape == ()
    assert all(m.shape == () and not m.requires_grad for m in out.metrics.values())


@pytest.mark.parametrize("name", CASES)
def test_sums_over_parts_equal_the_whole(name: str) -> None:
    loss, case = CASES[name]
    tensors = [t.detach() for t in case()]
    whole = loss(*tensors, 0.2)
    parts = [loss(*pieces, 0.2) for pieces in zip(*[t.split([1, 24, 0, 15]) for t in tensors])]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    for key, value in whole.metrics.items():
        torch.testing.assert_close(sum(p.metrics[key] for p in parts), value)


def test_surrogate_on_the_first_minibatch_is_the_policy_gradient() -> None:
    _, old, advantages = surrogate_case()
    logprobs = old.detach().clone().requires_grad_()
    out = clipped_surrogate(logprobs, old, advantages, clip=0.2)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages.detach())
    torch.testing.assert_close(out.loss, -advantages.sum())
    assert {k: v.item() for k, v in out.metrics.items()} == {"approxkl": 0, "approxkl_k3": 0, "clipfrac": 0, "ratio": N}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # already up far enough: clipped, no more push
        (1.5, -1.0, 1.5, 1.5),  # up although bad: pushed back in full
        (0.5, 1.0, -0.5, -0.5),  # down although good: pushed back in full
        (0.5, -1.0, 0.8, 0.0),  # already down far enough
        (1.1, 1.0, -1.1, -1.1),  # within the clip
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_surrogate_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logprob = torch.tensor([math.log(ratio) - 1], dtype=torch.float64, requires_grad=True)
    out = clipped_surrogate(logprob, torch.tensor([-1.0]), torch.tensor([advantage]), clip=0.2)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(gradient)  # d ratio / d lp = ratio
    assert out.metrics["clipfrac"].item() == (gradient == 0)
    assert out.metrics["ratio"].item() == pytest.approx(ratio)
    assert out.metrics["approxkl"].item() == pytest.approx(0.5 * math.log(ratio) ** 2)


def test_k3_is_the_exact_kl_in_expectation_over_the_old_policy() -> None:
    old, new = (torch.distributions.Categorical(logits=random(seed)) for seed in (6, 7))
    every = torch.arange(N)
    terms = [clipped_surrogate(new.log_prob(i)[None], old.log_prob(i)[None], torch.zeros(1), 0.2).metrics["approxkl_k3"] for i in every]
    torch.testing.assert_close((old.probs * torch.stack(terms)).sum(), torch.distributions.kl_divergence(old, new))


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [(1.1, 0.5 * 1.9**2, -1.9), (1.5, 0.5 * 1.8**2, 0.0), (0.0, 0.5 * 3.0**2, -3.0), (5.0, 0.5 * 2.0**2, 2.0)],
)
def test_value_loss_by_hand(value: float, loss: float, gradient: float) -> None:
    """Old value 1, return 3, clip 0.2: inside; past the clip towards the return (held); away from it (pushed back); far beyond it."""
    v = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    out = clipped_value_loss(v, torch.tensor([1.0]), torch.tensor([3.0]), clip=0.2)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss)
    assert v.grad is not None
    assert v.grad.item() == pytest.approx(gradient)
    assert out.metrics["error"].item() == pytest.approx((value - 3) ** 2)
    assert out.metrics["clipfrac"].item() == (gradient == 0)


def test_cross_entropy_is_torchs_forward_and_backward() -> None:
    logits = torch.randn(N, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(N) % 11
    ours, theirs = cross_entropy(token_logprobs(logits, ids).logprobs).loss, F.cross_entropy(logits, ids, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))
