"""The reward card's arithmetic against closed forms, slow loops, scipy, and a tabular model solved exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from srppo.diagnose.statistics import (
    buckets,
    effective_share,
    estimate,
    likelihood_gain,
    margin,
    preference,
    slope,
    spearman,
    standard_error,
    tempered_weights,
    weights_kl,
    within,
)

RNG = np.random.default_rng(0)
P, N = 40, 6
DEMONSTRATIONS = np.round(RNG.normal(1, 2, P), 1)  # rounded, so that ties occur
SAMPLES = np.round(RNG.normal(0, 2, (P, N)), 1)
SAME = RNG.random((P, N)) < 0.3
SAME[0] = True  # a prompt that cannot tell


def test_preference_is_the_auc_prompt_by_prompt() -> None:
    found = preference(DEMONSTRATIONS, SAMPLES, SAME)
    assert math.isnan(found[0])
    for p in range(1, P):
        differing = SAMPLES[p][~SAME[p]]
        if len(differing):
            u = stats.mannwhitneyu([DEMONSTRATIONS[p]], differing).statistic  # another library's count, ties half
            assert found[p] == pytest.approx(u / len(differing), abs=1e-12)
    assert margin(DEMONSTRATIONS, SAMPLES, SAME)[1] == pytest.approx(DEMONSTRATIONS[1] - SAMPLES[1][~SAME[1]].mean())
    assert math.isnan(margin(DEMONSTRATIONS, SAMPLES, SAME)[0])


def test_estimates_leave_out_prompts_that_do_not_tell() -> None:
    values = np.array([1.0, np.nan, 3.0])
    found = estimate(values)
    assert (found.value, found.n) == (2.0, 2) and found.low == 1.0 and found.high == 3.0
    assert estimate(np.array([np.nan])).value is None and estimate(np.zeros(0)).n == 0
    assert standard_error(values) == pytest.approx(stats.sem([1.0, 3.0])) and standard_error(np.array([1.0])) == math.inf


def test_weights_and_their_size() -> None:
    weights = tempered_weights(SAMPLES, 0.7)
    assert weights == pytest.approx(np.exp(SAMPLES / 0.7) / np.exp(SAMPLES / 0.7).sum(1, keepdims=True))
    assert tempered_weights(np.array([[1e6, 0.0]]), 1e-3).tolist() == [[1.0, 0.0]]  # no overflow
    equal, alone = np.full((1, N), 1 / N), np.eye(N)[:1]
    assert effective_share(equal) == pytest.approx(1) and effective_share(alone) == pytest.approx(1 / N)
    assert weights_kl(equal) == pytest.approx(0) and weights_kl(alone) == pytest.approx(math.log(N))
    assert weights_kl(weights)[3] == pytest.approx(stats.entropy(weights[3], np.full(N, 1 / N)))


def test_likelihood_gain_is_the_exact_one_where_all_responses_are_seen() -> None:
    """Three responses, a start that draws them alike: with each sampled once and the demonstration one of them, Z differs from the exact
    one only by the demonstration's being counted once more."""
    rewards, beta = np.array([[0.3, -1.0, 2.0]]), 0.8
    for d in range(3):
        found = likelihood_gain(rewards[:, d], rewards, beta)[0]
        z = np.exp(rewards[0] / beta)
        assert found == pytest.approx(rewards[0, d] / beta - math.log((z.sum() + z[d]) / 4))


def test_likelihood_gain_at_the_ends() -> None:
    found = likelihood_gain(DEMONSTRATIONS, SAMPLES, 1e9)
    assert found == pytest.approx(np.zeros(P), abs=1e-6)
    assert (likelihood_gain(DEMONSTRATIONS, SAMPLES, 0.5) <= math.log(N + 1) + 1e-12).all()
    assert likelihood_gain(np.array([5.0]), np.array([[0.0] * N]), 1e-3)[0] == pytest.approx(math.log(N + 1))
    assert likelihood_gain(np.array([0.0]), np.array([[1.0] * N]), 1e-2)[0] == pytest.approx(math.log((N + 1) / N) - 100)


def test_weights_converge_to_the_tabular_optimum() -> None:
    """pi* = start exp(r / beta) / Z on 8 responses: means under the weights of many samples reach the exact ones."""
    start, rewards, beta = RNG.dirichlet(np.ones(8)), RNG.normal(0, 1, 8), 0.6
    optimum = start * np.exp(rewards / beta)
    optimum /= optimum.sum()
    draws = RNG.choice(8, size=(1, 200_000), p=start)
    weights = tempered_weights(rewards[draws], beta)
    assert float((weights * rewards[draws]).sum()) == pytest.approx(optimum @ rewards, abs=0.02)
    assert float(weights_kl(weights)[0]) == pytest.approx(stats.entropy(optimum, start), abs=0.02)
    exact = np.log(optimum[2] / start[2])
    assert likelihood_gain(rewards[2:3], rewards[draws], beta)[0] == pytest.approx(exact, abs=0.02)


def test_rank_correlation_and_slope_against_scipy() -> None:
    x, y = SAMPLES.ravel(), np.round(SAMPLES.ravel() ** 2 + RNG.normal(0, 1, P * N))
    found = spearman(x, y)
    assert found == pytest.approx(stats.spearmanr(x, y).statistic)
    assert slope(x, y) == pytest.approx(stats.linregress(x, y).slope)
    assert spearman(np.ones(5), np.arange(5.0)) is None and slope(np.ones(5), np.arange(5.0)) is None
    assert within(np.array([[1.0, 3.0], [5.0, 5.0]])).tolist() == [-1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("lengths", [[], [4], [3, 3, 3], [1, 2], [1, 1, 1, 9], list(range(1, 50)), [2, 3, 3, 3, 3, 3, 10]])
def test_every_prompt_is_in_one_bucket(lengths: list[int]) -> None:
    found = buckets(lengths)
    assert len(found) != 1 and len(found) <= 3
    if found:
        assert np.sum([which for _, which in found], axis=0).tolist() == [1] * len(lengths)
    for (_, one), (_, other) in itertools.pairwise(found):
        assert max(n for n, w in zip(lengths, one) if w) < min(n for n, w in zip(lengths, other) if w)
