"""Sampling options, the warning where they bias the ratio, and the check of the engine's log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from srppo.errors import ConfigError
from srppo.rollout.engine import Sampling, bias_warning, mismatch


@pytest.mark.parametrize(
    ("options", "key"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"temperature": math.nan}, "temperature"),
     ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_k": -1}, "top_k")],
)  # fmt: skip
def test_impossible_options(options: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.{key}"):
        Sampling(**{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("options", "word"),
    [({"temperature": 0.7}, "temperature 0.7"), ({"top_p": 0.9}, "top_p 0.9"), ({"top_k": 50}, "top_k 50"), ({"greedy": True}, "greedy"),
     ({"temperature": 0.0}, "greedy")],
)  # fmt: skip
def test_bias_is_said(options: dict[str, float], word: str) -> None:
    sampling = Sampling(4, **options)
    text = bias_warning(sampling)
    assert sampling.biased and text is not None and f"sampled with {word}:" in text


def test_no_bias_nothing_said() -> None:
    assert not Sampling(4).biased and bias_warning(Sampling(4)) is None
    both = bias_warning(Sampling(4, temperature=0.5, top_k=3))
    assert both is not None and "temperature 0.5, top_k 3:" in both


def test_mismatch_by_hand() -> None:
    behaviour = torch.tensor([[-1.0, -2.0, torch.nan], [-0.5, 0.0, 0.0]])
    trainer = torch.tensor([[-1.0, -2.0 + math.log(2), 5.0], [-0.5 - math.log(4), 9.0, torch.inf]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = mismatch(behaviour, trainer, mask)
    assert found["mean_abs"] == pytest.approx((math.log(2) + math.log(4)) / 3)
    assert found["max_abs"] == pytest.approx(math.log(4))
    assert found["k3"] == pytest.approx(((2 - 1 - math.log(2)) + (0.25 - 1 + math.log(4))) / 3)


def test_mismatch_estimates_the_kl() -> None:
    """Tokens in the proportions of mu: k3's mean is then KL(mu || pi) exactly."""
    mu, pi = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    tokens = torch.tensor([[0, 0, 1, 2]])
    found = mismatch(mu.log()[tokens], pi.log()[tokens], torch.ones(1, 4, dtype=torch.bool))
    assert found["k3"] == pytest.approx(float((mu * (mu / pi).log()).sum()))


def test_mismatch_of_nothing() -> None:
    zeros = {"mean_abs": 0.0, "max_abs": 0.0, "k3": 0.0}
    assert mismatch(torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.bool)) == zeros
    assert mismatch(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)) == zeros
