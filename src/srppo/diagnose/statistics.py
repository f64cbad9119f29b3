"""The arithmetic of the reward card, in numpy: pure functions of rewards, no models.

P prompts, n samples a prompt. A NaN stands for "this prompt does not tell"; estimates are over the prompts that do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from srppo.diagnose.reward_card import Estimate
from srppo.intervals import bootstrap_interval

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def estimate(values: Floats) -> Estimate:
    """Mean over prompts [P] with its bootstrap interval, NaNs left out."""
    told = values[~np.isnan(values)]
    if not len(told):
        return Estimate(None)
    return Estimate(float(told.mean()), *bootstrap_interval(told.tolist()), len(told))


def standard_error(values: Floats) -> float:
    """Of the mean over prompts [P], NaNs left out; infinite where fewer than two tell."""
    told = values[~np.isnan(values)]
    return float(told.std(ddof=1) / np.sqrt(len(told))) if len(told) > 1 else np.inf


def preference(demonstrations: Floats, samples: Floats, same: Flags) -> Floats:
    """[P] share of a prompt's samples with a lower reward than its demonstration, ties half: the AUC within a prompt.

    demonstrations [P] and samples [P, n]: rewards. same [P, n]: the sample is the demonstration, token for token; it is left out,
    so that the figure says how the reward ranks what differs. NaN where nothing differs. (Mann and Whitney 1947, prompt by prompt; ours.)
    """
    wins = (demonstrations[:, None] > samples) + 0.5 * (demonstrations[:, None] == samples)
    return _mean_where(wins, ~same)


def margin(demonstrations: Floats, samples: Floats, same: Flags) -> Floats:
    """[P] reward of the demonstration minus the mean of the samples that differ from it, nats; NaN where none does."""
    return demonstrations - _mean_where(samples, ~same)


def _mean_where(x: Floats, which: Flags) -> Floats:
    """[P] means over the chosen entries of each row [P, n]; NaN where there are none."""
    counts = which.sum(1)
    sums = np.where(which, x, 0.0).sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def tempered_weights(rewards: Floats, beta: float) -> Floats:
    """[P, n] self-normalised weights w_i = exp(r_i / beta) / sum_j exp(r_j / beta) of samples from the start.

    For KL anchor = start they make the samples stand for the optimum of E[r] - beta KL, pi* = start exp(r / beta) / Z,
    as well as n samples can (self-normalised importance sampling; best-of-n where beta is small).
    """
    scaled = rewards / beta
    weights = np.exp(scaled - scaled.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def effective_share(weights: Floats) -> Floats:
    """[P] effective sample size over n: 1 for equal weights, 1 / n where one sample has all (Kong 1992)."""
    return 1 / (weights.shape[1] * (weights**2).sum(1))


def weights_kl(weights: Floats) -> Floats:
    """[P] sum_i w_i log(n w_i), nats: KL of the weights to equal ones, an estimate (from below) of KL(pi* || start)."""
    n = weights.shape[1]
    return (weights * np.log(np.maximum(n * weights, 1e-300))).sum(1)


def likelihood_gain(demonstrations: Floats, samples: Floats, beta: float) -> Floats:
    """[P] how much likelier the optimum pi* would make the held-out demonstration than the start does, nats; cautious.

    log pi*(d) - log pi_start(d) = r(d) / beta - log Z, Z = E_start[exp(r / beta)]. Z is estimated by the n samples and the demonstration
    itself, which bounds the result by log(n + 1) and keeps it from growing only because n samples missed what has a high reward:

        log(n + 1) - log(1 + sum_i exp((r_i - r(d)) / beta))

    (the contrastive bound of van den Oord et al. 2018, arXiv 1807.03748, at temperature beta; its use here is ours.)
    beta -> infinity gives 0. It falls without bound where beta is small and some sample has a higher reward than the demonstration.
    """
    gaps = (samples - demonstrations[:, None]) / beta
    top = np.maximum(gaps.max(1), 0.0)
    return np.log(samples.shape[1] + 1) - top - np.log(np.exp(-top) + np.exp(gaps - top[:, None]).sum(1))


def spearman(x: Floats, y: Floats) -> float | None:
    """Rank correlation of two series, ties at their mean rank; None where either does not vary."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(x: Floats) -> Floats:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[place], dtype=np.float64)


def slope(x: Floats, y: Floats) -> float | None:
    """Least-squares slope of y over x; None where x does not vary."""
    if len(x) < 2 or np.ptp(x) == 0:
        return None
    return float(np.polyfit(x, y, 1)[0])


def within(x: Floats) -> Floats:
    """[P * n] values [P, n] with each prompt's mean taken off."""
    return (x - x.mean(1, keepdims=True)).ravel()


def buckets(lengths: list[int], most: int = 3) -> list[tuple[str, Flags]]:
    """Prompts by their demonstration's length, in up to `most` buckets of about equal size: name and which of the P are in it."""
    values = np.asarray(lengths)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, most + 1)).astype(int)) if len(values) else values
    if len(edges) < 3:
        return []
    out = []
    for i in range(len(edges) - 1):
        low, high = int(edges[i]) + (i > 0), int(edges[i + 1])
        chosen = (values >= low) & (values <= high)
        if chosen.any():
            out.append((f"{low} to {high} tokens" if low < high else f"{low} tokens", chosen))
    return out if len(out) > 1 else []
