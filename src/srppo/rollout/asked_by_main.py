"""Of several processes one asks the rollout engine for all rows: for engines that live elsewhere, such as vLLM's servers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srppo.models.sharding import whole_on_main
from srppo.records import Rollout
from srppo.rollout.decode import unwrapped
from srppo.rollout.engine import Progress, RolloutEngine, Sampling
from srppo.rollout.vllm_weights import Mark
from srppo.world import world

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AskedByMain:
    """A RolloutEngine around another that only rank 0 talks to, and shows it whole weights in rank 0's CPU memory. No GPU holds them."""

    def __init__(self, engine: RolloutEngine):
        self._engine, self._copy = engine, WholeCopy()

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_index: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> Rollout:
        """See RolloutEngine."""
        with self._copy.shown(unwrapped(model)):
            return world().once(lambda: self._engine.generate(model, prompts, seeds, sampling, prompt_index, on_progress))


class WholeCopy:
    """The spread weights of the model that was asked for last, whole on rank 0's CPU; gathered again where they have changed since."""

    def __init__(self) -> None:
        self._of: weakref.ref[nn.Module] | None = None
        self._mark: Mark | None = None
        self._tensors: dict[int, nn.Parameter] = {}  # by the spread parameter's id

    @contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """Within, on rank 0 the model's spread parameters are whole ones on the CPU: for reading, not for running it."""
        places = [(m._parameters, name) for m in model.modules() for name, p in _held(m).items() if isinstance(p, DTensor)]
        spread: dict[int, Any] = {id(held[name]): held[name] for held, name in places}
        parts: list[Tensor] = [p._local_tensor for p in spread.values()]
        known = self._of is not None and self._of() is model and self._mark is not None and self._mark.holds(parts)
        if world().any(not known):
            self._of, self._mark, self._tensors = None, None, {}  # makes room
            copies = whole_on_main({str(key): p for key, p in spread.items()})
            self._tensors = {int(key): nn.Parameter(tensor, requires_grad=False) for key, tensor in copies.items()}
            self._of, self._mark = weakref.ref(model), Mark(parts)
        before = [(held, name, _any(held)[name]) for held, name in places] if world().main else []
        try:
            for held, name, parameter in before:
                held[name] = self._tensors[id(parameter)]
            yield
        finally:
            for held, name, parameter in before:
                held[name] = parameter


def _held(module: nn.Module) -> dict[str, Any]:
    return _any(module._parameters)


def _any(held: Any) -> dict[str, Any]:
    """A module's parameters, of which PyTorch's types do not say that they may be DTensors."""
    found: dict[str, Any] = held
    return found
