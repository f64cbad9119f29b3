"""What needs no training: engines that answer otherwise than by sampling the SFT model, so that `evaluate` judges them like any other."""

from __future__ import annotations

import math
import random
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
N = 16  # samples to choose from


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
    """Of N samples of the SFT model one, drawn with weights exp(reward / beta), at beta 0 the one with the highest reward.

    Greedy answers are the SFT model's own.
    """

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
        roles, engine = self._space.loaded.roles, self._space.loaded.evaluation_engine
        with roles.use("sft") as sft:
            if sampling.greedy:
                return engine.generate(sft, prompts, seeds, sampling, prompt_index, on_progress)
            rows = [list(p) for p in prompts for _ in range(N)]
            drawn = [stream_seed(seed, "best of", i) for seed in seeds for i in range(N)]
            many = engine.generate(sft, rows, drawn, sampling, list(range(len(rows))), on_progress)
        said = [role_logprobs(roles, role, many, ROWS) for role in ("sft", "base")]
        rewards = coherent_reward(self._space.config.reward)(*said, many.mask, many.ended).scores
        by_prompt = rewards.reshape(len(prompts), N)
        if self._beta > 0:  # Gumbel-max: the highest of rewards / beta + noise is a draw from the softmax
            draws = [random.Random(stream_seed(seed, "drawn of")) for seed in seeds]
            noise = torch.tensor([[-math.log(-math.log(rng.random() or 1e-300)) for _ in range(N)] for rng in draws])
            by_prompt = by_prompt / self._beta + noise
        chosen = torch.arange(len(prompts)) * N + by_prompt.argmax(1)
        index = list(prompt_index) if prompt_index is not None else list(range(len(prompts)))
        picked = [x[chosen] for x in (many.responses, many.mask, many.behaviour_logprobs, many.ended)]
        return Rollout([list(p) for p in prompts], index, *picked)
