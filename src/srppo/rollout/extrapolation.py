"""Sampling past the SFT model without training: a preview of where PPO is heading, and a baseline that it must beat.

R rows of the decode batch, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from srppo.errors import ConfigError, ModelError
from srppo.records import Rollout
from srppo.rollout.decode import NextToken, unwrapped
from srppo.rollout.engine import Progress, Sampling
from srppo.rollout.record import position_limit
from srppo.rollout.torch_engine import TorchEngine

if TYPE_CHECKING:
    from srppo.models.roles import Roles


def generate_extrapolated(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    beta: float,
    engine: TorchEngine,
    start: str = "sft",
    numerator: str | None = None,
    prompt_index: Sequence[int] | None = None,
    on_progress: Progress | None = None,
) -> Rollout:
    """Responses whose every token comes from the extrapolated distribution

        softmax(lp_start + (lp_numerator - lp_base) / beta)        (lp: log-probabilities of all tokens, given those before)

    The optimum of the reward log numerator(y|x) - log base(y|x) with KL coefficient beta to the start is the same expression
    over whole responses, normalised once; here each token is normalised by itself. The form is that of proxy tuning (Liu et al.
    2024, arXiv 2401.08565, eq. 1, its three models here at most three roles) and of contrastive decoding (Li et al. 2022,
    arXiv 2210.15097), without the latter's plausibility cut: where beta is small, tokens unlikely to all models may win.

    numerator: the start itself by default. beta: above 0; infinity samples from the start, and base is not run.
    The engine's batches, per-row seeds, ends and errors (see TorchEngine.generate); behaviour_logprobs [B, T] are those of
    the extrapolated distribution, untempered and unfiltered. Roles are left as they were.
    Raises ConfigError for another beta; ModelError for base as the numerator or a role that is not there.
    """
    numerator = numerator or start
    if not beta > 0:
        raise ConfigError(f"the extrapolation's beta is {beta}; it must be above 0, as the KL coefficient that it stands for")
    if numerator == "base":
        raise ModelError("base cannot be extrapolated: its log-ratio to itself is 0 everywhere; take a role trained from it")
    weights = dict.fromkeys([start, numerator, "base"], 0.0)
    weights[start] += 1
    weights[numerator] += 1 / beta
    weights["base"] -= 1 / beta
    with ExitStack() as stack:
        models = {role: stack.enter_context(roles.use(role)) for role, weight in weights.items() if weight}
        if len(models) == 1:
            return engine.generate(models[start], prompts, seeds, sampling, prompt_index, on_progress)
        for model in models.values():
            stack.enter_context(engine.generating(model))
        shared = len({id(model) for model in models.values()}) < len(models)  # adapters on one model: switched for each pass
        step = CombinedToken(
            [
                (weights[role], NextToken(model, engine.special.pad_id), partial(roles.use, role) if shared else nullcontext)
                for role, model in models.items()
            ]
        )
        rooms = [room for model in models.values() if (room := position_limit(unwrapped(model).config)) is not None]
        room = min(rooms, default=None)
        return engine.generate_by(step, room, prompts, seeds, sampling, prompt_index, on_progress, len(models))


class CombinedToken:
    """A decoding Step whose logits are a weighted sum of several models': sum_i w_i z_i.

    Their caches are one cache, in which the layers of each stand after those of the one before, so that rows enter and leave alike.
    parts: for each model its weight, its own step, and a context in which the step is that model's.
    """

    def __init__(self, parts: Sequence[tuple[float, NextToken, Callable[[], AbstractContextManager[object]]]]):
        self.parts = parts
        self.pad_id, self.device, self.config = parts[0][1].pad_id, parts[0][1].device, parts[0][1].config
        self.layers = [len(part.new_cache().layers) for _, part, _ in parts]

    def new_cache(self) -> DynamicCache:
        own = [part.new_cache() for _, part, _ in self.parts]
        return _view(own[0], [layer for cache in own for layer in cache.layers])

    def __call__(self, ids: Tensor, attention: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """ids and positions [R, Q]; attention [R, columns so far + Q]. Returns [R, V] float32; two such tensors are held at most."""
        total: Tensor | None = None
        first = 0
        for (weight, part, acting), count in zip(self.parts, self.layers, strict=True):
            with acting():
                logits = part(ids, attention, positions, _view(cache, cache.layers[first : first + count])).float()
            total = logits * weight if total is None else total.add_(logits, alpha=weight)
            first += count
        assert total is not None and first == len(cache.layers)
        return total


def _view(cache: DynamicCache, layers: list[Any]) -> DynamicCache:
    """Another cache of the same kind on these layers, the very objects."""
    view = copy.copy(cache)
    view.layers = layers
    return view
