"""One trained role: its parameters, its AdamW, and the step that clips, checks and moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from srppo.memory_limit import limits
from srppo.models.sharding import own, squared_norm, sum_between_copies
from srppo.records import LossOutput
from srppo.world import world

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20  # of gradients summed at once


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. metrics are means over `denominator` tokens."""

    loss: float  # mean a token
    metrics: dict[str, float]
    grad_norm: float  # global norm before clipping
    skipped: bool  # a loss or gradient was NaN or infinite: nothing moved


@dataclass(frozen=True)
class Cut:
    """A step's work, and how it is cut into micro-batches of at most so many tokens."""

    key: str  # of the recipe, which asks for `asked` tokens
    asked: int
    least: int  # tokens of the longest row
    losses: Callable[[int], Iterable[Callable[[], LossOutput]]]  # tokens -> micro-batches' losses; called again where memory runs out


MicroLosses = Iterable[Callable[[], LossOutput]] | Cut


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
        kinds = [[p for p in self.parameters.values() if isinstance(p, DTensor) == spread] for spread in (False, True)]
        self.optimizer = torch.optim.AdamW(
            [{"params": kind} for kind in kinds if kind],  # the fused step does not mix them
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            eps=self.epsilon,
            betas=(0.9, 0.999),
            fused=True,  # one pass over a weight and its moments, on CPU and GPU
        )

    def set_lr(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self, micro_losses: MicroLosses, denominator: int) -> StepResult:
        """One optimizer step from micro-batches.

        micro_losses: callables, or a Cut of the work into such, which is cut finer where memory runs out. Each builds one micro-batch's
        graph and returns its loss as a SUM over tokens; every sum is divided by the one global denominator, so any cut into micro-batches
        gives the same gradient. Of several processes each brings its own micro-batches, and all take the same step.
        """
        if isinstance(micro_losses, Cut):
            cut = micro_losses
            total, sums = limits.within(cut.key, cut.asked, cut.least, lambda size: self._accumulate(cut.losses(size), denominator))
        else:
            total, sums = self._accumulate(micro_losses, denominator)
        total, sums = _over_processes(total, sums)
        parameters = list(self.parameters.values())
        sum_gradients([p for p in parameters if not isinstance(p, DTensor)])
        norm = clip_gradients(parameters, self.max_grad_norm)
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

    def _accumulate(self, micro_losses: Iterable[Callable[[], LossOutput]], denominator: int) -> tuple[float, dict[str, Tensor]]:
        """Gradients of the micro-batches, from zero. Returns the sums of their losses and metrics."""
        total, sums = 0.0, dict[str, Tensor]()
        self.optimizer.zero_grad(set_to_none=True)
        for micro_loss, last in with_last(micro_losses):
            sum_between_copies(last)
            out = micro_loss()
            (out.loss / max(denominator, 1)).backward()
            total += float(out.loss.detach())
            for name, value in out.metrics.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().float().cpu()
        return total, sums

    def state(self) -> dict[str, Tensor]:
        """The optimizer's moments under `parameter/slot` names: themselves, for a checkpoint that is written at once."""
        tensors = {}
        for name, parameter in self.parameters.items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{slot}"] = torch.as_tensor(value).detach()
        return tensors

    def places(self) -> dict[str, Tensor]:
        """Under the names of `state`, tensors that are spread over processes as the moments are, once there are any."""
        return {f"{name}/{slot}": p.detach() for name, p in self.parameters.items() for slot in ("exp_avg", "exp_avg_sq")}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        order = {id(p): i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        index = {name: order[id(parameter)] for name, parameter in self.parameters.items()}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, slot = key.rsplit("/", 1)
            slots.setdefault(index[name], {})[slot] = value
        whole = self.optimizer.state_dict()
        whole["state"] = slots
        self.optimizer.load_state_dict(whole)
        for parameter, held in self.optimizer.state.items():
            for slot, value in held.items():  # the fused step goes over raw memory: a moment must lie as its weight does
                if not isinstance(value, DTensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    held[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last."""
    nothing = object()
    before: Any = nothing
    for item in items:
        if before is not nothing:
            yield before, False
        before = item
    if before is not nothing:
        yield before, True


def sum_gradients(parameters: Sequence[Parameter]) -> None:
    """Add up, over the processes of the run, the gradients of parameters that each holds whole. One that is None in all stays None."""
    here = world()
    if here.alone or not parameters:
        return
    asked = here.sum_(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)).tolist()
    found = [p for p, count in zip(parameters, asked) if count]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for dtype in sorted({p.dtype for p in found}, key=str):
        gradients = [p.grad for p in found if p.dtype == dtype and p.grad is not None]
        for part in _buckets(gradients):
            flat = here.sum_(torch.cat([g.reshape(-1) for g in part]))
            for gradient, summed in zip(part, flat.split([g.numel() for g in part])):
                gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Runs of tensors of about BUCKET_BYTES each."""
    out: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if room <= 0:
            out.append([])
            room = BUCKET_BYTES
        out[-1].append(tensor)
        room -= tensor.numel() * tensor.element_size()
    return out


def clip_gradients(parameters: Sequence[Parameter], max_norm: float) -> float:
    """Scale gradients to a global norm of at most max_norm. Returns the norm before: of all parameters, spread ones included."""
    if not any(isinstance(p, DTensor) for p in parameters):
        return float(torch.nn.utils.clip_grad_norm_(list(parameters), max_norm))
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(squared_norm(gradients, own(gradients[0]).device).sqrt()) if gradients else 0.0
    for gradient in gradients:
        own(gradient).mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


def silenced(loss: Callable[[], LossOutput]) -> Callable[[], LossOutput]:
    """The same graph with a loss and metrics of zero."""

    def silent() -> LossOutput:
        out = loss()
        return LossOutput(out.loss * 0, {name: value * 0 for name, value in out.metrics.items()})

    return silent


def _over_processes(total: float, sums: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and metric sums over all processes, added in the order of the ranks. One without a micro-batch knows no names."""
    if world().alone:
        return total, sums
    everyone = world().gather((total, sums))
    names = dict.fromkeys(name for _, own_sums in everyone for name in own_sums)
    added = {n: sum((own_sums[n] for _, own_sums in everyone if n in own_sums), torch.zeros(())) for n in names}
    return sum(part for part, _ in everyone), added


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
