"""One trained role: its parameters, its AdamW, and the step that clips, checks and moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from srppo.records import LossOutput


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. metrics are means over `denominator` tokens."""

    loss: float  # mean a token
    metrics: dict[str, float]
    grad_norm: float  # global norm before clipping
    skipped: bool  # a loss or gradient was NaN or infinite: nothing moved


@dataclass
class Learner:
    """AdamW over named parameters; gradients scaled to a global norm; non-finite steps skipped.

    consecutive_skips and total_skips count steps whose loss or gradient was NaN or infinite.
    """

    parameters: Mapping[str, Parameter]
    learning_rate: float
    max_grad_norm: float
    weight_decay: float = 0.0
    epsilon: float = 1e-8
    consecutive_skips: int = 0
    total_skips: int = 0
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ValueError("a learner needs at least one parameter")
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            betas=(0.9, 0.999),
            fused=True,  # one pass over a weight and its moments, on CPU and GPU
        )

    def set_lr(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self, micro_losses: Iterable[Callable[[], LossOutput]], denominator: int) -> StepResult:
        """One optimizer step from micro-batches.

        Each callable builds one micro-batch's graph and returns its loss as a SUM over tokens; every sum is divided by the one
        global denominator, so any cut into micro-batches gives the same gradient.
        """
        total, sums = 0.0, dict[str, Tensor]()
        self.optimizer.zero_grad(set_to_none=True)
        for micro_loss in micro_losses:
            out = micro_loss()
            (out.loss / max(denominator, 1)).backward()
            total += float(out.loss.detach())
            for name, value in out.metrics.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().float().cpu()
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.max_grad_norm))
        skipped = not (math.isfinite(total) and math.isfinite(norm))
        if skipped:
            self.consecutive_skips += 1
            self.total_skips += 1
        else:
            self.optimizer.step()
            self.consecutive_skips = 0
        self.optimizer.zero_grad(set_to_none=True)
        means = {name: float(value) / max(denominator, 1) for name, value in sums.items()}
        return StepResult(total / max(denominator, 1), means, norm, skipped)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's moments under `parameter/slot` names, on the CPU."""
        tensors = {}
        for name, parameter in self.parameters.items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{slot}"] = torch.as_tensor(value).detach().cpu().clone()
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        index = {name: i for i, name in enumerate(self.parameters)}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, slot = key.rsplit("/", 1)
            slots.setdefault(index[name], {})[slot] = value
        whole = self.optimizer.state_dict()
        whole["state"] = slots
        self.optimizer.load_state_dict(whole)
        for parameter, own in self.optimizer.state.items():
            for slot, value in own.items():  # the fused step goes over raw memory: a moment must lie as its weight does
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    own[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def cosine_lr(step: int, total: int, peak: float, warmup: float, final_fraction: float) -> float:
    """Learning rate of 0-based `step`: linear rise over warmup * total steps, then a cosine down to final_fraction * peak."""
    rise = round(warmup * total)
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise) / max(1, total - 1 - rise)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def scheduled_lr(kind: str, iteration: int, total: int, peak: float) -> float:
    """Learning rate of a 0-based PPO iteration: constant, linear (to 0 after the last) or cosine."""
    if kind == "constant":
        return peak
    done = iteration / max(1, total)
    return peak * (1 - done) if kind == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))
