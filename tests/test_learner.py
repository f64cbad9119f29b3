"""The optimizer step: one denominator, clipping that clips, non-finite steps skipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from srppo.records import LossOutput
from srppo.train.learner import Learner, cosine_lr, scheduled_lr, with_last


def cloned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a checkpoint would hold it."""
    return {name: value.clone() for name, value in state.items()}


def quadratic(parameter: Parameter, targets: torch.Tensor) -> LossOutput:
    """Sum over tokens of (p - target)^2: gradient 2 (p - target) a token."""
    loss = ((parameter - targets) ** 2).sum()
    return LossOutput(loss, {"error": loss.detach()})


def make(value: float = 1.0, **options: float) -> tuple[Parameter, Learner]:
    parameter = Parameter(torch.tensor([value], dtype=torch.float64))
    return parameter, Learner({"p": parameter}, learning_rate=0.1, max_grad_norm=options.pop("max_grad_norm", 1e9), **options)


def test_the_last_is_known() -> None:
    assert [list(with_last(range(n))) for n in (0, 1, 3)] == [[], [(0, True)], [(0, False), (1, False), (2, True)]]


def test_micro_batches_of_any_size_take_the_same_step() -> None:
    targets = torch.arange(8, dtype=torch.float64)
    results = []
    for cut in (1, 2, 8):
        parameter, learner = make()
        parts = targets.split(cut)
        step = learner.step([lambda p=parameter, part=part: quadratic(p, part) for part in parts], denominator=8)
        results.append((float(parameter.detach()), step.loss, step.grad_norm))
    assert results[0] == pytest.approx(results[1], abs=1e-12) and results[0] == pytest.approx(results[2], abs=1e-12)
    # mean of 2 (p - t) over t = 0..7 at p = 1 is 2 (1 - 3.5) = -5; the loss is the mean of (1 - t)^2
    assert results[0][2] == pytest.approx(5.0) and results[0][1] == pytest.approx(float(((1 - targets) ** 2).mean()))


def test_the_gradient_is_scaled_down_to_the_norm() -> None:
    seen = []
    parameter, learner = make(max_grad_norm=0.5)
    inner = learner.optimizer.step
    learner.optimizer.step = lambda: seen.append(parameter.grad.clone()) or inner()  # type: ignore[method-assign]
    step = learner.step([lambda: quadratic(parameter, torch.tensor([4.0], dtype=torch.float64))], denominator=1)
    assert step.grad_norm == pytest.approx(6.0)  # before clipping
    assert abs(float(seen[0])) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_moves_nothing_and_is_counted(bad: float) -> None:
    parameter, learner = make()
    step = learner.step([lambda: quadratic(parameter, torch.tensor([bad], dtype=torch.float64))], denominator=1)
    assert step.skipped and float(parameter.detach()) == 1.0 and learner.consecutive_skips == 1
    assert not learner.optimizer.state  # the moments have not seen it either
    learner.step([lambda: quadratic(parameter, torch.zeros(1, dtype=torch.float64))], denominator=1)
    assert learner.consecutive_skips == 0 and learner.total_skips == 1 and float(parameter.detach()) != 1.0


def test_a_finite_loss_with_a_non_finite_gradient_is_skipped() -> None:
    parameter, learner = make(value=0.0)
    step = learner.step([lambda: LossOutput(parameter.abs().sqrt().sum(), {})], denominator=1)  # derivative of sqrt at 0 is infinite
    assert step.skipped and float(parameter.detach()) == 0.0


def test_state_carries_over_exactly() -> None:
    targets = [torch.tensor([float(t)], dtype=torch.float64) for t in (3, -2, 5, 1)]
    parameter, learner = make()
    for t in targets:
        learner.step([lambda t=t: quadratic(parameter, t)], 1)
    again, first = make()
    for t in targets[:2]:
        first.step([lambda t=t: quadratic(again, t)], 1)
    moved = Parameter(again.detach().clone())
    second = Learner({"p": moved}, 0.1, 1e9)
    second.load_state(cloned(first.state()))
    for t in targets[2:]:
        second.step([lambda t=t: quadratic(moved, t)], 1)
    assert torch.equal(parameter, moved)


def test_cosine_rises_linearly_and_ends_at_its_fraction() -> None:
    lrs = [cosine_lr(step, 20, 1.0, 0.2, 0.1) for step in range(20)]
    assert lrs[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert lrs[4] == pytest.approx(1.0) and lrs[-1] == pytest.approx(0.1)
    middle = 4 + 15 / 2  # halfway down the cosine is the mean of both ends
    assert cosine_lr(int(middle), 20, 1.0, 0.2, 0.1) > 0.55 > cosine_lr(int(middle) + 1, 20, 1.0, 0.2, 0.1)
    assert cosine_lr(0, 1, 1.0, 0.0, 0.1) == 1.0


def test_schedules_over_rounds() -> None:
    assert scheduled_lr("constant", 7, 10, 2.0) == 2.0
    assert scheduled_lr("linear", 5, 10, 2.0) == pytest.approx(1.0)
    assert scheduled_lr("cosine", 5, 10, 2.0) == pytest.approx(1.0) and math.isclose(scheduled_lr("cosine", 0, 10, 2.0), 2.0)


def test_epsilon_reaches_the_optimizer() -> None:
    """One Adam step from rest moves by lr g / (|g| + eps): half a learning rate where eps equals the gradient."""
    parameter = Parameter(torch.tensor([1.0], dtype=torch.float64))
    learner = Learner({"p": parameter}, learning_rate=0.1, max_grad_norm=1e9, epsilon=2.0)
    learner.step([lambda: quadratic(parameter, torch.zeros(1, dtype=torch.float64))], 1)
    assert float(parameter.detach()) == pytest.approx(1.0 - 0.1 * 0.5)


def test_moments_of_a_transposed_weight_resume() -> None:
    """Checkpoints hold contiguous tensors; the fused step goes over memory as it lies."""

    def learner(weight: torch.Tensor) -> Learner:
        return Learner({"w": torch.nn.Parameter(weight)}, 0.1, 1e9)

    def step(made: Learner, seed: int) -> None:
        target = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        made.step([lambda: LossOutput(((made.parameters["w"] - target) ** 2).sum(), {})], 1)

    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole = learner(start.clone().t())
    step(whole, 1)
    saved, state = whole.parameters["w"].detach().clone(memory_format=torch.contiguous_format), cloned(whole.state())
    step(whole, 2)
    lying = torch.empty(6, 4).t()
    lying.copy_(saved)
    resumed = learner(lying)
    resumed.load_state({name: value.contiguous() for name, value in state.items()})
    step(resumed, 2)
    assert not resumed.parameters["w"].is_contiguous() and torch.equal(resumed.parameters["w"], whole.parameters["w"])
