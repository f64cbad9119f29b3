"""Intervals against scipy's bootstrap and the normal approximation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from srppo.intervals import bootstrap_interval, paired_gain


def test_the_interval_is_scipys() -> None:
    values = np.random.default_rng(1).random(60)
    low, high = bootstrap_interval(values.tolist())
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)).confidence_interval
    assert low == pytest.approx(theirs.low, abs=4e-3) and high == pytest.approx(theirs.high, abs=4e-3)
    half = 1.96 * values.std() / np.sqrt(60)
    assert high - low == pytest.approx(2 * half, rel=0.06)


def rows(scores: list[list[float]], group: str = "g") -> list[dict[str, object]]:
    return [{"group": group, "row": i, "prompt": f"p{i}", "sampled_scores": s} for i, s in enumerate(scores)]


def test_pairing_cancels_what_makes_a_prompt_hard() -> None:
    hard = np.random.default_rng(0).random(50)
    before = rows([[float(h)] for h in hard])
    after = rows([[float(h) + 0.1] for h in hard])
    gain = paired_gain(before, after, "g")
    assert gain and gain.gain == pytest.approx(0.1) and gain.low == pytest.approx(0.1) and gain.high == pytest.approx(0.1) and gain.clear


def test_a_difference_that_chance_could_give_is_not_clear() -> None:
    coin = np.random.default_rng(3).integers(0, 2, size=(2, 40)).astype(float)
    gain = paired_gain(rows([[x] for x in coin[0]]), rows([[x] for x in coin[1]]), "g")
    assert gain and not gain.clear and gain.n == 40


def test_nothing_to_compare() -> None:
    assert paired_gain(rows([[1.0]]), rows([[1.0]]), "other") is None
    unscored = [{"group": "g", "row": 0, "prompt": "p0", "sampled_scores": None}]
    assert paired_gain(unscored, rows([[1.0]]), "g") is None
