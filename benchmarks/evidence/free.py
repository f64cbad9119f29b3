"""What needs no training: engines that answer otherwise than by sampling the SFT model, so that `evaluate` judges them like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from srppo.methods.srppo import coherent_reward
from srppo.models.over_rollout import role_logprobs
from srppo.records import Rollout
from srppo.rollout.engine import Progress, Sampling
from srppo.rollout.extrapolation import generate_extrapolated
from srppo.seeding import stream_seed
from srppo.workspace import Workspace

ROWS = 256  # scored at once


class Extrapolated:
    """Logit extrapolation at a beta, sampled or greedy."""

    def __init__(self, space: Workspace, beta: float):
        self._space, self._beta = space, beta

    def generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_index: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> Rollout:
        loaded = self._space.loaded
        engine = loaded.evaluation_engine
        return generate_extrapolated(
            loaded.roles, prompts, seeds, sampling, beta=self._beta, engine=engine, prompt_index=prompt_index, on_progress=on_progress
        )


class BestOf:
    """Of n samples of the SFT model the one with the highest coherent reward. Greedy answers are the SFT model's own."""

    def __init__(self, space: Workspace, n: int):
        self._space, self._n = space, n

    def generate(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        prompt_index: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> Rollout:
        roles, engine = self._space.loaded.roles, self._space.loaded.evaluation_engine
        with roles.use("sft") as sft:
            if sampling.greedy:
                return engine.generate(sft, prompts, seeds, sampling, prompt_index, on_progress)
            rows = [list(p) for p in prompts for _ in range(self._n)]
            drawn = [stream_seed(seed, "best of", i) for seed in seeds for i in range(self._n)]
            many = engine.generate(sft, rows, drawn, sampling, list(range(len(rows))), on_progress)
        said = [role_logprobs(roles, role, many, ROWS) for role in ("sft", "base")]
        rewards = coherent_reward(self._space.config.reward)(*said, many.mask, many.ended).scores
        best = rewards.reshape(len(prompts), self._n).argmax(1)
        chosen = torch.arange(len(prompts)) * self._n + best
        index = list(prompt_index) if prompt_index is not None else list(range(len(prompts)))
        return Rollout(
            [list(p) for p in prompts],
            index,
            many.responses[chosen],
            many.mask[chosen],
            many.behaviour_logprobs[chosen],
            many.ended[chosen],
        )
