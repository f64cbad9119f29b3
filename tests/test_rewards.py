"""rewards.py by hand values, identities that hold for every option, exact KL divergences, and Ziegler's controller."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from srppo.advantages import reward_to_go
from srppo.masking import masked_whiten
from srppo.rewards import AdaptiveKL, CoherentReward, kl_k1, kl_k3, last_token, token_log_ratio

NAN, INF = float("nan"), float("inf")
POISON = torch.tensor([NAN, INF, -INF])

# Three rows: ended after 3 tokens, cut at the limit of 4, empty. Log-ratios of the first two: 1, -2, .5 and 2, 2, -1, 3.
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
ENDED = torch.tensor([True, False, False])
LP_BASE = torch.tensor([[-3.0, -1.0, -2.0, NAN], [-3.0, -3.0, -1.0, -4.0], [NAN, -INF, 7.0, INF]])
LP_SFT = torch.tensor([[-2.0, -3.0, -1.5, 9.0], [-1.0, -1.0, -2.0, -1.0], [NAN, -INF, 5.0, -INF]])


def random_rollouts(seed: int, rows: int = 9, columns: int = 6) -> dict[str, Any]:
    """Random log-probabilities, lengths (some rows empty) and endings, with NaN and infinities off the mask."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, columns + 1, (rows,), generator=g)
    lengths[:4] = torch.tensor([0, 1, columns, 0])
    mask = torch.arange(columns) < lengths.unsqueeze(1)
    out: dict[str, Tensor] = {}
    for name in ("lp_reward", "lp_base"):
        lp = -2 * torch.rand(rows, columns, generator=g, dtype=torch.float64)
        out[name] = torch.where(mask, lp, POISON[torch.randint(0, 3, (rows, columns), generator=g)])
    ended = torch.rand(rows, generator=g) < 0.5
    ended[[0, 3]] = torch.tensor([False, True])  # of the two empty rows
    return out | {"mask": mask, "ended": ended}


def every_option() -> list[CoherentReward]:
    choices: dict[str, tuple[Any, ...]] = {
        "placement": ("eos", "token"),
        "length_normalization": ("none", "mean"),
        "include_eos": (True, False),
        "missing_eos": ("penalty", "exclude", "keep"),
        "token_clip": (None, 0.3),
        "whiten": (False, True),
    }
    combinations = itertools.product(*choices.values())
    return [CoherentReward(**dict(zip(choices, c)), scale=1.7, token_shift=0.1, missing_eos_penalty=0.7) for c in combinations]


def test_log_ratio_by_hand() -> None:
    zero = [0.0] * 4
    assert token_log_ratio(LP_SFT, LP_BASE, MASK, ENDED).tolist() == [[1, -2, 0.5, 0], [2, 2, -1, 3], zero]
    no_eos = token_log_ratio(LP_SFT, LP_BASE, MASK, ENDED, include_eos=False, token_shift=1.0)
    assert no_eos.tolist() == [[0, -3, 0, 0], [1, 1, -2, 2], zero]  # the cut row has no EOS to leave out
    clipped = token_log_ratio(LP_SFT, LP_BASE, MASK, ENDED, token_clip=1.5)
    assert clipped.tolist() == [[1, -1.5, 0.5, 0], [1.5, 1.5, -1, 1.5], zero]


def test_a_shift_equal_to_the_clip_is_never_positive() -> None:
    r = random_rollouts(0)
    terms = token_log_ratio(**r, token_clip=0.5, token_shift=0.5)
    assert (terms <= 0).all()
    assert (terms[r["mask"]] >= -1).all()
    assert terms.min() == -1  # reached: the clip came first


@pytest.mark.parametrize(
    ("options", "scores", "rewards"),
    [
        ({"placement": "eos"}, [-0.5, 5, 0], [[0, 0, -0.5, 0], [0, 0, 0, 5], [0, 0, 0, 0]]),
        ({"placement": "token"}, [-0.5, 5, 0], [[1, -2, 0.5, 0], [2, 2, -1, 2], [0, 0, 0, 0]]),
        ({"placement": "eos", "length_normalization": "mean", "scale": 12.0}, [-2, 17, 0], [[0, 0, -2, 0], [0, 0, 0, 17], [0, 0, 0, 0]]),
        ({"placement": "token", "length_normalization": "mean", "scale": 12.0}, [-2, 17, 0], [[4, -8, 2, 0], [6, 6, -3, 8], [0, 0, 0, 0]]),
        ({"placement": "eos", "scale": 0.5, "missing_eos": "keep"}, [-0.25, 3, 0], [[0, 0, -0.25, 0], [0, 0, 0, 3], [0, 0, 0, 0]]),
        ({"placement": "token", "include_eos": False}, [-1, 5, 0], [[1, -2, 0, 0], [2, 2, -1, 2], [0, 0, 0, 0]]),
        ({"placement": "eos", "include_eos": False}, [-1, 5, 0], [[0, 0, -1, 0], [0, 0, 0, 5], [0, 0, 0, 0]]),
        ({"placement": "eos", "missing_eos": "exclude"}, [-0.5, 6, 0], [[0, 0, -0.5, 0], [0, 0, 0, 6], [0, 0, 0, 0]]),
    ],
)
def test_reward_by_hand(options: dict[str, Any], scores: list[float], rewards: list[list[float]]) -> None:
    out = CoherentReward(**options)(LP_SFT, LP_BASE, MASK, ENDED)
    torch.testing.assert_close(out.scores, torch.tensor(scores, dtype=torch.float32))
    torch.testing.assert_close(out.token_rewards, torch.tensor(rewards, dtype=torch.float32))
    assert out.keep.tolist() == [True, options.get("missing_eos") != "exclude", False]
    assert out.log_ratio.tolist() == [[1, -2, 0.5, 0], [2, 2, -1, 3], [0, 0, 0, 0]]


@pytest.mark.parametrize("reward", every_option(), ids=str)
def test_what_holds_for_every_option(reward: CoherentReward) -> None:
    r = random_rollouts(3)
    out = reward(**r)
    assert out.scores.isfinite().all()
    assert (out.token_rewards[~r["mask"]] == 0).all()
    empty = ~r["mask"].any(1)
    assert (out.scores[empty] == 0).all()
    assert out.keep.tolist() == (~empty & (r["ended"] | (reward.missing_eos != "exclude"))).tolist()
    if not reward.whiten:
        torch.testing.assert_close(out.token_rewards.sum(1), out.scores)
    if reward.placement == "eos":
        assert (out.token_rewards[~last_token(r["mask"])] == 0).all()


@pytest.mark.parametrize("reward", every_option(), ids=str)
def test_padding_of_any_length_and_the_other_rows_change_nothing(reward: CoherentReward) -> None:
    r = random_rollouts(4)
    out = reward(**r)
    for extra in (1, 7):
        longer = {k: v if k == "ended" else torch.cat([v, torch.full((9, extra), False if k == "mask" else NAN)], 1) for k, v in r.items()}
        again = reward(**longer)
        torch.testing.assert_close(again.scores, out.scores)
        torch.testing.assert_close(again.token_rewards[:, :6], out.token_rewards)
        assert not again.token_rewards[:, 6:].any()
    if not reward.whiten:  # whitening is over the batch
        alone = reward(**{k: v[4:5] for k, v in r.items()})
        torch.testing.assert_close(alone.token_rewards, out.token_rewards[4:5])


@pytest.mark.parametrize("reward", [o for o in every_option() if o.placement == "eos"], ids=str)
def test_both_placements_have_the_same_return_at_gamma_one(reward: CoherentReward) -> None:
    r = random_rollouts(5)
    other = CoherentReward(**{**vars(reward), "placement": "token"})
    eos, token = reward(**r), other(**r)
    torch.testing.assert_close(eos.scores, token.scores)
    first = [reward_to_go(o.token_rewards, r["mask"], gamma=1.0)[:, 0] for o in (eos, token)]
    torch.testing.assert_close(first[0], first[1])
    assert not torch.allclose(eos.token_rewards, token.token_rewards)


@pytest.mark.parametrize("placement", ["eos", "token"])
def test_penalty_lands_at_the_last_token_and_only_without_eos(placement: Any) -> None:
    r = random_rollouts(6)
    options = {"placement": placement, "length_normalization": "mean", "scale": 3.0}
    kept = CoherentReward(missing_eos="keep", **options)(**r)
    fined = CoherentReward(missing_eos="penalty", missing_eos_penalty=0.25, **options)(**r)
    unended = last_token(r["mask"]) & ~r["ended"].unsqueeze(1)
    assert unended.any()
    torch.testing.assert_close(kept.token_rewards - fined.token_rewards, 0.25 * unended.double())


@pytest.mark.parametrize("missing_eos", ["penalty", "exclude"])
def test_whitening_rescales_the_kept_scores_and_keeps_signs(missing_eos: Any) -> None:
    r = random_rollouts(7)
    out = CoherentReward(whiten=True, missing_eos=missing_eos)(**r)
    white = out.token_rewards.sum(1)
    torch.testing.assert_close(white[out.keep].std(correction=0), torch.tensor(1.0, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(white[out.keep], masked_whiten(out.scores, out.keep, shift_mean=False)[out.keep])
    assert (white.sign() == out.scores.sign()).all()
    token = CoherentReward(whiten=True, missing_eos=missing_eos, placement="token")(**r)
    torch.testing.assert_close(token.token_rewards.sum(1), white)


def test_whitening_one_row_or_equal_scores_is_finite() -> None:
    one = CoherentReward(whiten=True)(LP_SFT[:1], LP_BASE[:1], MASK[:1], ENDED[:1])
    assert one.token_rewards.tolist() == [[0, 0, -0.5, 0]]


def test_last_token_of_no_rows_no_columns_and_gaps() -> None:
    assert last_token(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    for shape in ((0, 4), (3, 0)):
        out = CoherentReward()(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape[0]).bool())
        assert out.token_rewards.shape == shape
        assert out.scores.tolist() == [0] * shape[0]


@pytest.mark.parametrize("wrong", [{"placement": "end"}, {"length_normalization": "sum"}, {"missing_eos": "drop"}])
def test_unknown_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is one of .*, got '{next(iter(wrong.values()))}'"):
        CoherentReward(**wrong)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_kl_estimators_are_exact_in_expectation(estimator: Any) -> None:
    g = torch.Generator().manual_seed(0)
    policy, anchor = (torch.distributions.Categorical(logits=torch.randn(7, generator=g, dtype=torch.float64)) for _ in range(2))
    every = torch.arange(7)
    terms = estimator(policy.log_prob(every).unsqueeze(0), anchor.log_prob(every).unsqueeze(0), torch.ones(1, 7))
    exact = torch.distributions.kl_divergence(policy, anchor)
    torch.testing.assert_close((policy.probs * terms[0]).sum(), exact)
    assert (terms < 0).any() == (estimator is kl_k1)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_kl_estimators_are_zero_off_the_mask(estimator: Any) -> None:
    r = random_rollouts(8)
    terms = estimator(r["lp_reward"], r["lp_base"], r["mask"])
    assert (terms[~r["mask"]] == 0).all()
    assert terms.isfinite().all()
    assert estimator(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), torch.tensor([[True]])).item() == pytest.approx(
        {"kl_k1": 2.0, "kl_k3": 2.718281828**-2 - 1 + 2}[estimator.__name__]
    )


@pytest.mark.parametrize(
    ("kl", "episodes", "factor"),
    [
        (6.0, 256, 1.0),  # on target
        (6.6, 256, 1 + 0.1 * 0.0256),  # 10 % above
        (5.4, 512, 1 - 0.1 * 0.0512),
        (60.0, 256, 1 + 0.2 * 0.0256),  # clipped at 20 %
        (-1.0, 256, 1 - 0.2 * 0.0256),  # a negative estimate of a small KL
        (INF, 256, 1 + 0.2 * 0.0256),
        (0.0, 80_000, 1 - 0.2),  # ours: never further than 20 %, where the rule as written gives 1 - 0.2 * 8 < 0
        (NAN, 256, 1.0),
    ],
)
def test_adaptive_kl_by_hand(kl: float, episodes: int, factor: float) -> None:
    control = AdaptiveKL(coef=0.15, target=6.0, horizon=10_000)
    after = control.updated(kl, episodes)
    assert after.coef == pytest.approx(0.15 * factor, rel=1e-12)
    assert (after.target, after.horizon) == (6.0, 10_000)
    assert control.coef == 0.15
