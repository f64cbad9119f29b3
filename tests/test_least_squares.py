"""The value function in closed form: against NumPy's least squares, on data whose answer is known, and under bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from srppo.models.least_squares import FIRST, FORGETTING, STRENGTHS, LeastSquaresValues

CPU = torch.device("cpu")


def rounds(count: int, rows: int, width: int, noise: float = 0.1, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(width, generator=g)
    out = []
    for _ in range(count):
        x = torch.randn(rows, width, generator=g) + 3.0
        out.append((x, x @ truth + 5.0 + noise * torch.randn(rows, generator=g)))
    return out


def explained(values: torch.Tensor, returns: torch.Tensor) -> float:
    return 1 - float((returns - values).var() / returns.var())


def by_hand(data: list[tuple[torch.Tensor, torch.Tensor]], strength: float) -> tuple[np.ndarray, float]:
    """Weighted ridge regression with a free intercept, rows stacked and handed to NumPy's least squares."""
    weights = np.concatenate([np.full(len(y), FORGETTING ** (len(data) - 1 - i)) for i, (_, y) in enumerate(data)])
    x = np.concatenate([a.double().numpy() for a, _ in data])
    y = np.concatenate([b.double().numpy() for _, b in data])
    mean, level = np.average(x, axis=0, weights=weights), np.average(y, weights=weights)
    root = np.sqrt(weights)[:, None]
    centred = root * (x - mean)
    variances = (centred**2).sum(0)
    ridge = strength * np.concatenate([np.full(6, variances[:6].mean()), 1e-6 * variances[6:]])
    rows = np.concatenate([centred, np.diag(np.sqrt(ridge))])
    w = np.linalg.lstsq(rows, np.concatenate([root[:, 0] * (y - level), np.zeros(x.shape[1])]), rcond=None)[0]
    return w, level - mean @ w


def test_every_strength_is_weighted_ridge_regression_over_all_rounds() -> None:
    data, fitted = rounds(4, 30, 8), LeastSquaresValues(6, 2, CPU)
    for x, y in data:
        assert fitted.fit([(x[:11], y[:11]), (x[11:], y[11:])])
    for i, strength in enumerate(STRENGTHS):
        w, bias = by_hand(data, strength)
        np.testing.assert_allclose(fitted.weights[i].numpy(), w, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(float(fitted.biases[i]), bias, rtol=1e-8)
    x = data[0][0]
    line = fitted.linear()
    torch.testing.assert_close(torch.nn.functional.linear(x, line["weight"], line["bias"])[:, 0], fitted(x), atol=1e-4, rtol=1e-4)


def test_it_says_zero_before_it_is_fitted_and_learns_a_linear_value_in_one_round() -> None:
    (x, y), (later, after) = rounds(2, 400, 6)
    fitted = LeastSquaresValues(6, 0, CPU)
    assert fitted(x).eq(0).all() and fitted(x).dtype == torch.float32
    fitted.fit([(x, y)])
    fitted.fit([(later, after)])
    assert STRENGTHS[fitted.chosen] == min(STRENGTHS) and explained(fitted(later), after) > 0.99


@pytest.mark.parametrize(("noise", "strong"), [(0.1, False), (40.0, True)])
def test_the_strength_is_the_one_whose_fits_predicted_the_rounds_after_them_best(noise: float, strong: bool) -> None:
    data, fitted = rounds(6, 12, 8, noise), LeastSquaresValues(6, 2, CPU)
    for x, y in data:
        fitted.fit([(x, y)])
    errors = np.zeros(len(STRENGTHS))
    for seen in range(1, len(data)):
        x, y = (t.double().numpy() for t in data[seen])
        lines = [by_hand(data[:seen], strength) for strength in STRENGTHS]
        errors = FORGETTING * errors + [((x @ w + bias - y) ** 2).sum() for w, bias in lines]
    assert fitted.chosen == errors.argmin() and (fitted.chosen > FIRST if strong else fitted.chosen < FIRST)


def test_old_rounds_are_forgotten() -> None:
    fitted = LeastSquaresValues(3, 0, CPU)
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    for sign in (1, -1):
        for _ in range(40):
            fitted.fit([(x, sign * x[:, 0])])
    assert explained(fitted(x), -x[:, 0]) > 0.99


@pytest.mark.parametrize("bad", ["states", "returns"])
def test_what_is_not_finite_changes_nothing(bad: str) -> None:
    ((x, y),) = rounds(1, 20, 4)
    fitted = LeastSquaresValues(4, 0, CPU)
    fitted.fit([(x, y)])
    before = {k: v.clone() for k, v in fitted.tensors().items()}
    broken = x.clone(), y.clone()
    broken[bad == "returns"].view(-1)[3] = float("inf")
    assert not fitted.fit([broken]) and not fitted.fit([(x[:0], y[:0])]) and not fitted.fit([])
    assert all(torch.equal(before[k], v) for k, v in fitted.tensors().items())


def test_states_that_never_vary_give_the_mean_return() -> None:
    fitted = LeastSquaresValues(4, 0, CPU)
    x = torch.ones(10, 4)
    assert fitted.fit([(x, torch.arange(10.0))]) and fitted(x).sub(4.5).abs().max() < 1e-5
