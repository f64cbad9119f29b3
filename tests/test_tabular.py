"""Self-Rewarding PPO on a tabular language model, where everything it should converge to can be written down.

Three tokens and an EOS, at most three tokens a response: 40 responses, 13 prefixes. Models are tables of logits, one row a prefix.
The policy starts as pi_sft and is trained with this package's reward, KL term, GAE and clipped surrogate, on policy, with exact
expectations in place of samples (each response is weighted by its probability under the policy that "sampled" it).

The identities are those that follow from the objective E_pi[r] - beta KL(pi || anchor), whose maximiser is
pi* = anchor exp(r / beta) / Z (e.g. Korbak et al. 2022, arXiv 2205.11275), for r = log pi_sft - log pi_base.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from srppo.advantages import generalized_advantages, reward_to_go
from srppo.losses import clipped_surrogate, clipped_value_loss
from srppo.masking import masked_sum, masked_whiten, unflatten
from srppo.rewards import AdaptiveKL, CoherentReward, kl_k1, kl_k3

WORDS, LIMIT, EOS = 3, 3, 3
PREFIXES = [p for n in range(LIMIT) for p in itertools.product(range(WORDS), repeat=n)]
RESPONSES = [(*p, EOS) for p in PREFIXES] + list(itertools.product(range(WORDS), repeat=LIMIT))  # the last ones are cut at the limit
TOKENS = torch.tensor([[*y, *[0] * (LIMIT - len(y))] for y in RESPONSES])  # [B, T]
MASK = torch.tensor([[t < len(y) for t in range(LIMIT)] for y in RESPONSES])
ENDED = torch.tensor([y[-1] == EOS for y in RESPONSES])
STATE = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(LIMIT)] for y in RESPONSES])


def logprobs(table: Tensor) -> Tensor:
    """[B, T] log-probability of each token of every response, from logits [prefixes, tokens]; NaN off the mask, which nothing may read."""
    return torch.where(MASK, table.log_softmax(-1)[STATE, TOKENS], torch.nan)


def distribution(table: Tensor) -> Tensor:
    """[B] probability of every response."""
    return masked_sum(logprobs(table), MASK, dim=1).exp()


def normalised(x: Tensor) -> Tensor:
    return x / x.sum()


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


def kl(p: Tensor, q: Tensor) -> float:
    return (p * (p / q).log()).sum().item()


@dataclass
class World:
    """A base model and an SFT model some way from it."""

    seed: int = 2
    base: Tensor = field(init=False)
    sft: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.base = torch.randn(len(PREFIXES), WORDS + 1, generator=g, dtype=torch.float64)
        self.sft = self.base + 0.7 * torch.randn(len(PREFIXES), WORDS + 1, generator=g, dtype=torch.float64)

    def rewards(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Scores [B] and token rewards [B, T] of every response."""
        options = {"missing_eos": "keep"} | options  # cut responses count as they are: then the identities hold without exception
        out = CoherentReward(**options)(logprobs(self.sft), logprobs(self.base), MASK, ENDED)
        return out.scores, out.token_rewards


def exact_values(rewards: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """[B, T] the expected reward-to-go in each state: a critic that has converged."""
    to_go, weight = reward_to_go(rewards, MASK, gamma)[MASK], weights.unsqueeze(1).expand_as(rewards)[MASK]
    total, mass = (torch.zeros(len(PREFIXES), dtype=torch.float64).index_add(0, STATE[MASK], x) for x in (weight * to_go, weight))
    return unflatten((total / mass)[STATE[MASK]], MASK)


def train(start: Tensor, reward: Tensor, anchor: Tensor | None, beta: float, iterations: int = 100, lam: float = 0.95) -> Tensor:
    """On-policy PPO from the logits `start`; returns the policy's logits."""
    policy = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([policy], lr=0.05)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / iterations)
    for _ in range(iterations):
        old = logprobs(policy).detach()
        weights = distribution(policy).detach()
        rewards = reward if anchor is None else reward - beta * kl_k1(old, logprobs(anchor), MASK)
        advantages, _ = generalized_advantages(rewards, exact_values(rewards, weights, 1.0), MASK, gamma=1.0, lam=lam)
        weighted = (weights.unsqueeze(1) * advantages)[MASK]  # the surrogate is homogeneous in the advantage
        for _ in range(4):
            optimizer.zero_grad()
            clipped_surrogate(logprobs(policy)[MASK], old[MASK], weighted, clip=0.2).loss.backward()
            optimizer.step()
        decay.step()
    return policy.detach()


def train_by_sampling(start: Tensor, reward: Tensor, beta: float, iterations: int = 100, rows: int = 512) -> Tensor:
    """The same with sampled responses, a critic learned from them and whitened advantages: PPO as it is run, the anchor its start."""
    policy, critic = start.clone().requires_grad_(), torch.zeros(len(PREFIXES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [policy], "lr": 0.03}, {"params": [critic], "lr": 0.1}])
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / iterations)
    g = torch.Generator().manual_seed(0)
    for _ in range(iterations):
        drawn = torch.multinomial(distribution(policy).detach(), rows, replacement=True, generator=g)
        mask, state, old = MASK[drawn], STATE[drawn], logprobs(policy).detach()[drawn]
        old_values = critic.detach()[state]
        rewards = reward[drawn] - beta * kl_k1(old, logprobs(start)[drawn], mask)
        advantages, returns = generalized_advantages(rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = masked_whiten(advantages, mask)
        for _ in range(4):
            optimizer.zero_grad()
            actor = clipped_surrogate(logprobs(policy)[drawn][mask], old[mask], advantages[mask], clip=0.2)
            error = clipped_value_loss(critic[state][mask], old_values[mask], returns[mask], clip=0.5)
            ((actor.loss + error.loss) / mask.sum()).backward()
            optimizer.step()
        decay.step()
    return policy.detach()


PLACEMENTS = pytest.mark.parametrize("placement", ["eos", "token"])


def test_the_enumeration_is_complete() -> None:
    assert len(RESPONSES) == len(set(RESPONSES)) == 40
    assert distribution(World().sft).sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("beta", [0.5, 2.0])
@PLACEMENTS
def test_anchor_sft_converges_to_the_extrapolated_sft(placement: str, beta: float) -> None:
    """pi* = pi_sft (pi_sft / pi_base)^(1 / beta) / Z."""
    w = World()
    base, sft = distribution(w.base), distribution(w.sft)
    optimum = normalised(sft * (sft / base) ** (1 / beta))
    assert total_variation(sft, optimum) > 0.15  # there is a way to go
    policy = distribution(train(w.sft, w.rewards(placement=placement)[1], w.sft, beta))
    assert total_variation(policy, optimum) < 0.005
    assert total_variation(policy, normalised(sft * (sft / base) ** (0.8 / beta))) > 0.01  # the bound tells betas apart


@PLACEMENTS
def test_sampled_ppo_with_a_learned_critic_converges_there_too(placement: str) -> None:
    w = World()
    base, sft = distribution(w.base), distribution(w.sft)
    optimum = normalised(sft * (sft / base))
    assert total_variation(sft, optimum) > 0.3
    assert total_variation(distribution(train_by_sampling(w.sft, w.rewards(placement=placement)[1], beta=1.0)), optimum) < 0.02


@PLACEMENTS
def test_anchor_base_with_beta_one_converges_to_the_sft(placement: str) -> None:
    """From another start: nothing to gain over the SFT but generalisation."""
    w = World(1)
    sft = distribution(w.sft)
    assert total_variation(distribution(w.base), sft) > 0.15
    policy = distribution(train(w.base, w.rewards(placement=placement)[1], w.base, beta=1.0))
    assert total_variation(policy, sft) < 0.005

    rewards = w.rewards(placement=placement)[1] - kl_k1(logprobs(w.sft), logprobs(w.base), MASK)
    torch.testing.assert_close(rewards.sum(1), torch.zeros(len(RESPONSES), dtype=torch.float64))
    advantages, _ = generalized_advantages(rewards, exact_values(rewards, sft, 1.0), MASK)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))  # so an SFT start stays where it is


@PLACEMENTS
def test_without_kl_the_policy_collapses_onto_the_largest_ratio(placement: str) -> None:
    w = World()
    score, reward = w.rewards(placement=placement)
    best = score.argmax()
    sft = distribution(w.sft)
    assert sft[best] < 0.1
    assert sft.argmax() != best
    policy = distribution(train(w.sft, reward, None, beta=0.0, iterations=200))
    assert policy[best] > 0.99


@pytest.mark.parametrize(
    "options",
    [
        {"length_normalization": "mean", "scale": 2.0},
        {"include_eos": False},
        {"token_clip": 0.5, "token_shift": 0.5},
        {"missing_eos": "penalty", "missing_eos_penalty": 0.8},
    ],
    ids=str,
)
@PLACEMENTS
def test_every_option_converges_to_the_anchor_tilted_by_its_score(placement: str, options: dict[str, Any]) -> None:
    """pi* = pi_sft exp(score / beta) / Z: placement decides credit, never the optimum."""
    w = World(1)
    score, reward = w.rewards(placement=placement, **options)
    sft, beta = distribution(w.sft), 0.8
    plain = normalised(sft * (w.rewards()[0] / beta).exp())
    optimum = normalised(sft * (score / beta).exp())
    assert total_variation(optimum, plain) > 0.02  # the option matters
    assert total_variation(distribution(train(w.sft, reward, w.sft, beta)), optimum) < 0.005


@pytest.mark.parametrize("seed", range(4))
def test_expected_reward_is_the_kl_between_the_two_models(seed: int) -> None:
    """E_sft[r] = KL(sft || base) >= 0 and E_base[r] = -KL(base || sft) <= 0: text like the SFT's earns, text like the base's pays."""
    w = World(seed)
    base, sft, score = distribution(w.base), distribution(w.sft), w.rewards()[0]
    torch.testing.assert_close(score, (sft / base).log())
    assert (sft * score).sum().item() == pytest.approx(kl(sft, base), abs=1e-12)
    assert (base * score).sum().item() == pytest.approx(-kl(base, sft), abs=1e-12)
    assert (base * score).sum() < 0 < (sft * score).sum()


def test_sft_like_text_earns_per_token_so_longer_pays() -> None:
    """The length bias: at every prefix one more token of the SFT's is worth KL(sft || base) >= 0 there, one of the base's costs."""
    w = World()
    rows = w.sft.log_softmax(-1) - w.base.log_softmax(-1)  # [prefixes, tokens], by definition
    assert ((w.sft.softmax(-1) * rows).sum(1) >= 0).all()
    assert ((w.base.softmax(-1) * rows).sum(1) <= 0).all()
    mean_at = [normalised(distribution(w.sft) * MASK[:, t]) @ w.rewards(placement="token")[1][:, t] for t in range(LIMIT)]
    assert all(m > 0 for m in mean_at)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_kl_estimators_summed_over_tokens_are_the_kl_of_responses(estimator: Any) -> None:
    w = World()
    terms = estimator(logprobs(w.sft), logprobs(w.base), MASK).sum(1)
    sft, base = distribution(w.sft), distribution(w.base)
    assert (sft * terms).sum().item() == pytest.approx(kl(sft, base), abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_with_an_exact_critic_lambda_does_not_move_the_expected_gradient(lam: float) -> None:
    """Placement and lambda trade variance only: at gamma 1 the expected policy gradient is the same, that of E[r]."""
    w = World()
    sft, score = distribution(w.sft), w.rewards()[0]
    exact_policy = w.sft.clone().requires_grad_()
    expected = torch.autograd.grad(-(distribution(exact_policy) * score).sum(), exact_policy)[0]
    for placement in ("eos", "token"):
        reward, policy = w.rewards(placement=placement)[1], w.sft.clone().requires_grad_()
        advantages, _ = generalized_advantages(reward, exact_values(reward, sft, 1.0), MASK, 1.0, lam)
        loss = clipped_surrogate(logprobs(policy)[MASK], logprobs(w.sft)[MASK], (sft.unsqueeze(1) * advantages)[MASK], clip=0.2).loss
        torch.testing.assert_close(torch.autograd.grad(loss, policy)[0], expected)


def test_adaptive_kl_finds_the_beta_whose_optimum_has_the_target_kl() -> None:
    """The controller around an optimiser that is always done: beta settles where KL(pi*_beta || sft) is the target."""
    w = World()
    base, sft = distribution(w.base), distribution(w.sft)
    control = AdaptiveKL(coef=5.0, target=0.1, horizon=1000)
    for _ in range(300):
        optimum = normalised(sft * (sft / base) ** (1 / control.coef))
        control = control.updated(kl(optimum, sft), episodes=200)
    assert kl(optimum, sft) == pytest.approx(0.1, rel=1e-3)
