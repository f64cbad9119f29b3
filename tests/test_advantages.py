"""advantages.py against closed forms, the lines of TRL's trainer, and numpy."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from srppo.advantages import generalized_advantages, group_baseline, reward_to_go

GAMMA_LAMBDA = [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)]


def random_case(seed: int, rows: int = 5, columns: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, columns, generator=g, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, columns + 1, (rows,), generator=g)
    lengths[0], lengths[1] = columns, 1
    return rewards, values, torch.arange(columns) < lengths.unsqueeze(1)


def trl_lines(first: str, last: str) -> str:
    """Lines of TRL's PPO trainer from the one starting with `first` to the one starting with `last`: its arithmetic has no function."""
    trainer = importlib.import_module("trl.experimental.ppo.ppo_trainer").PPOTrainer
    lines = inspect.getsource(trainer.train).splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip().startswith(first)]
    ends = [i for i, line in enumerate(lines) if line.strip().startswith(last)]
    return textwrap.dedent("\n".join(lines[starts[0] : ends[0] + 1]))


@pytest.mark.parametrize(("gamma", "lam"), GAMMA_LAMBDA)
def test_gae_equals_the_sum_of_discounted_errors(gamma: float, lam: float) -> None:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, eq. 16 of the paper, row by row without recursion."""
    rewards, values, mask = random_case(0)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    for b, length in enumerate(mask.sum(1).tolist()):
        v = [*values[b, :length].tolist(), 0.0]
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), GAMMA_LAMBDA)
def test_gae_equals_trl(gamma: float, lam: float) -> None:
    rewards, values, mask = random_case(1)
    names: dict[str, Any] = {
        "rewards": rewards * mask,
        "values": values * mask,
        "responses": mask,
        "args": SimpleNamespace(gamma=gamma, lam=lam),
        "torch": torch,
    }
    exec(trl_lines("lastgaelam = 0", "returns = advantages + values"), names)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages[mask], names["advantages"][mask])
    torch.testing.assert_close(returns[mask], names["returns"][mask])


def test_lambda_zero_is_the_td_error_and_lambda_one_is_reward_to_go_minus_value() -> None:
    rewards, values, mask = random_case(2)
    r, v = rewards * mask, values * mask
    following = torch.cat([v[:, 1:], torch.zeros(5, 1)], 1)
    torch.testing.assert_close(generalized_advantages(rewards, values, mask, 0.9, 0.0)[0], (r + 0.9 * following - v) * mask)
    to_go = r.flip(1).cumsum(1).flip(1) * mask  # gamma 1
    advantages, returns = generalized_advantages(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(advantages, to_go - v)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(reward_to_go(rewards, mask, 1.0), to_go)


def test_reward_to_go_by_hand() -> None:
    rewards, mask = torch.tensor([[1.0, 2.0, 4.0], [8.0, 100.0, 100.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert reward_to_go(rewards, mask, 0.5).tolist() == [[3, 4, 4], [8, 0, 0]]
    assert reward_to_go(rewards, mask, 0.0).tolist() == [[1, 2, 4], [8, 0, 0]]


def test_exact_values_give_zero_expected_advantage() -> None:
    """One state, two actions: with V the expected reward, the advantages average to 0 under the policy."""
    p, reward = 0.3, torch.tensor([[2.0], [-1.0]])
    value = torch.full((2, 1), p * 2 - (1 - p) * 1)
    advantages, _ = generalized_advantages(reward, value, torch.ones(2, 1))
    assert (torch.tensor([p, 1 - p]) @ advantages[:, 0]).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("extra", [0, 1, 6])
def test_padding_of_any_length_and_content_changes_nothing(extra: int, poison: float) -> None:
    rewards, values, mask = random_case(3)
    expected = generalized_advantages(rewards * mask, values * mask, mask, 0.95, 0.9)
    tail = torch.full((5, extra), poison, dtype=torch.float64)
    rewards, values = (torch.cat([torch.where(mask, x, poison), tail], 1) for x in (rewards, values))
    longer = torch.cat([mask, torch.zeros(5, extra, dtype=torch.bool)], 1)
    for ours, theirs in zip(generalized_advantages(rewards, values, longer, 0.95, 0.9), expected):
        assert (ours[~longer] == 0).all()
        torch.testing.assert_close(ours[:, :7], theirs, rtol=0, atol=0)


def test_empty_rows_rows_of_none_and_no_gradient() -> None:
    rewards, values, mask = random_case(4)
    mask[2] = False
    advantages, returns = generalized_advantages(rewards, values.requires_grad_(), mask)
    assert not advantages[2].any()
    assert not returns[2].any()
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert generalized_advantages(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3))[0].shape == (0, 3)
    assert generalized_advantages(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0))[0].shape == (2, 0)


def test_group_baseline_equals_numpy_group_means() -> None:
    scores, groups = torch.tensor([1.0, 5.0, 3.0, 9.0, 2.0, 4.0]), [7, -2, 7, 7, -2, 100]
    array, number = scores.numpy(), np.array(groups)
    means = [array[number == g].mean() for g in groups]
    others = [np.delete(array, i)[np.delete(number, i) == g] for i, g in enumerate(groups)]
    for given in (groups, torch.tensor(groups)):
        assert group_baseline(scores, given).tolist() == pytest.approx(means)
        assert group_baseline(scores, given, leave_one_out=True).tolist() == pytest.approx([o.mean() if len(o) else 0 for o in others])


def test_leave_one_out_advantages_are_the_centred_ones_times_k_over_k_minus_one() -> None:
    scores, groups = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64), [0, 1, 2] * 4
    centred, loo = (scores - group_baseline(scores, groups, leave_one_out=x) for x in (False, True))
    torch.testing.assert_close(loo, centred * 4 / 3)


def test_group_baseline_wants_a_group_for_each_score() -> None:
    with pytest.raises(AssertionError, match="groups"):
        group_baseline(torch.zeros(3), [0, 1])
