"""A value function fitted in closed form: ridge regression of returns on features that a frozen model gives, earlier rounds discounted.

A linear function of features that never change needs no gradient steps and no learning rate. Ours, after least-squares temporal
differences (Bradtke and Barto 1996, doi 10.1023/A:1018056104778) and recursive least squares with exponential forgetting.
F features, S candidate strengths of the ridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

FORGETTING = 0.9  # weight of a round in the next one
STRENGTHS = (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)  # ridge, in units of the features' mean variance
FIRST = 4  # the strength used until one has been tried


class LeastSquaresValues:
    """V(x) = v + w (x - m): m and v the means of features and returns, w by ridge regression. 0 before the first fit.

    width: of the features that the ridge holds back; `free` more stand behind them, few and telling, that it does not.
    The ridge is the one, of S, whose fits to the rounds before have predicted the rounds after them best. Sums are kept in float64.
    """

    def __init__(self, width: int, free: int, device: torch.device):
        place = torch.device("cpu") if device.type == "mps" else device  # which has no float64

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=place)

        self.ridged = width
        width += free
        self.gram = zeros(width, width)  # sum of x x^T
        self.moment = zeros(width)  # sum of x V
        self.sums = zeros(width)  # sum of x
        self.totals = zeros(2)  # number of rows, sum of V
        self.errors = zeros(len(STRENGTHS))  # squared errors of each strength's predictions
        self.weights = zeros(len(STRENGTHS), width)
        self.biases = zeros(len(STRENGTHS))

    @property
    def chosen(self) -> int:
        """Which of STRENGTHS the values are taken from."""
        return int(self.errors.argmin()) if bool(self.errors.any()) else FIRST

    def __call__(self, features: Tensor) -> Tensor:
        """[N] float32 values of features [N, F], on their device."""
        x = features.to(self.gram.device).double()  # in this order: MPS has no float64
        return (x @ self.weights[self.chosen] + self.biases[self.chosen]).to(features.device, torch.float32)

    def fit(self, parts: Iterable[tuple[Tensor, Tensor]], total: Callable[[Tensor], object] = lambda x: x) -> bool:
        """Take in a round: features [N, F] and the returns [N] that followed, in parts. False, and nothing changed, where one is not
        finite or there is none. total: adds up a tensor in place over the processes that each have a part of the round."""
        kept = (self.gram, self.moment, self.sums, self.totals, self.errors)
        new = [torch.zeros_like(k) for k in kept]
        gram, moment, sums, totals, errors = new
        for features, returns in parts:
            x, y = (t.to(self.gram.device).double() for t in (features, returns))
            gram.addmm_(x.t(), x)
            moment.addmv_(x.t(), y)
            sums.add_(x.sum(0))
            totals.add_(torch.stack([y.new_tensor(len(y)), y.sum()]))
            if bool(self.totals[0]):  # before the first fit all say 0
                errors.add_((x @ self.weights.t() + self.biases - y[:, None]).square().sum(0))
        for share in new:
            total(share)
        if not bool(totals[0]) or not all(bool(n.isfinite().all()) for n in new):
            return False
        for old, added in zip(kept, new):
            old.mul_(FORGETTING).add_(added)
        self._solve()
        return True

    def _solve(self) -> None:
        """w = (C + ridge R)^-1 c of every strength: C the features' covariance, c theirs with the returns, R diagonal: the mean variance
        of the features that are held back, next to nothing for the others."""
        count, total = self.totals
        mean, level = self.sums / count, total / count
        covariance = self.gram - count * torch.outer(mean, mean)
        across = self.moment - count * level * mean
        variances = covariance.diagonal().clamp(min=1e-9 * float(count))
        held = torch.where(torch.arange(len(mean), device=mean.device) < self.ridged, variances[: self.ridged].mean(), 1e-6 * variances)
        for i, strength in enumerate(STRENGTHS):
            factor, failed = torch.linalg.cholesky_ex(covariance + torch.diag(strength * held))
            self.weights[i] = 0 if int(failed) else torch.cholesky_solve(across[:, None], factor)[:, 0]
            self.biases[i] = level - self.weights[i] @ mean

    def tensors(self) -> dict[str, Tensor]:
        """Everything it knows, by name; to copy into exactly."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def linear(self) -> dict[str, Tensor]:
        """weight [1, F] and bias [1] float32 of the values in use."""
        return {"weight": self.weights[self.chosen][None].float(), "bias": self.biases[self.chosen][None].float()}
