"""What needs no training: other ways to answer than sampling the SFT model, as engines, so that `evaluate` judges them like any other."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from benchmarks.evidence.cases import Free

from srppo.evaluate import Evaluation, evaluate
from srppo.methods.srppo import coherent_reward
from srppo.models.over_rollout import role_logprobs
from srppo.records import Rollout
from srppo.rollout.engine import Progress, Sampling
from srppo.rollout.extrapolation import generate_extrapolated
from srppo.seeding import stream_seed
from srppo.stages import sft_stage
from srppo.workspace import Workspace

TOKENS = 4096  # scored at once
N = 16  # samples to choose from


@dataclass(frozen=True)
class Asked:
    """What RolloutEngine.generate is given after the model."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    sampling: Sampling
    prompt_index: Sequence[int] | None = None
    on_progress: Progress | None = None


class Answering:
    """An engine made of a function."""

    def __init__(self, answer: Callable[[Any, Asked], Rollout]):
        self._answer = answer

    def generate(self, model: Any, *asked: Any, **named: Any) -> Rollout:
        return self._answer(model, Asked(*asked, **named))


def judge(space: Workspace, case: Free, samples: int) -> Evaluation:
    """The answers of the run's SFT model in the case's way, on the run's evaluation prompts."""
    sft_stage(space)
    loaded, role = space.loaded, "sft"
    engine: Any = loaded.evaluation_engine
    if case.how == "weights":
        role = "extrapolated"
        loaded.roles.extrapolate(role, "sft", case.strength)
    else:
        way = {"logits": extrapolated, "best_of": best_of, "temperature": tempered}[case.how]
        engine = Answering(partial(way, space, case.strength))
    return evaluate(
        loaded.roles,
        role,
        loaded.evaluation_prompts,
        scorer=loaded.scorer,
        engine=engine,
        decode=loaded.decode,
        max_new_tokens=space.config.rollout.max_new_tokens,
        samples=samples,
        seed=space.config.seed,
    )


def tempered(space: Workspace, temperature: float, sft: Any, asked: Asked) -> Rollout:
    """Samples of the SFT model at another temperature; greedy answers are the same."""
    sampling = replace(asked.sampling, temperature=temperature)
    return space.loaded.evaluation_engine.generate(sft, asked.prompts, asked.seeds, sampling, asked.prompt_index, asked.on_progress)


def extrapolated(space: Workspace, beta: float, sft: Any, asked: Asked) -> Rollout:
    """Logit extrapolation, sampled or greedy."""
    loaded = space.loaded
    how: dict[str, Any] = {"engine": loaded.evaluation_engine, "prompt_index": asked.prompt_index, "on_progress": asked.on_progress}
    return generate_extrapolated(loaded.roles, asked.prompts, asked.seeds, asked.sampling, beta=beta, **how)


def best_of(space: Workspace, beta: float, sft: Any, asked: Asked) -> Rollout:
    """Of N samples of the SFT model one, drawn with weights exp(reward / beta), at beta 0 the one with the highest reward.

    Greedy answers are the SFT model's own.
    """
    roles, engine = space.loaded.roles, space.loaded.evaluation_engine
    if asked.sampling.greedy:
        return engine.generate(sft, asked.prompts, asked.seeds, asked.sampling, asked.prompt_index, asked.on_progress)
    rows = [list(p) for p in asked.prompts for _ in range(N)]
    drawn = [stream_seed(seed, "best of", i) for seed in asked.seeds for i in range(N)]
    many = engine.generate(sft, rows, drawn, asked.sampling, list(range(len(rows))), asked.on_progress)
    said = [role_logprobs(roles, role, many, TOKENS) for role in ("sft", "base")]
    rewards = coherent_reward(space.config.reward)(*said, many.mask, many.ended).scores.reshape(-1, N)
    if beta > 0:  # Gumbel-max: the highest of rewards / beta + noise is a draw from the softmax
        draws = [random.Random(stream_seed(seed, "drawn of")) for seed in asked.seeds]
        noise = torch.tensor([[-math.log(-math.log(rng.random() or 1e-300)) for _ in range(N)] for rng in draws])
        rewards = rewards / beta + noise
    chosen = torch.arange(len(asked.prompts)) * N + rewards.argmax(1)
    index = list(asked.prompt_index) if asked.prompt_index is not None else list(range(len(asked.prompts)))
    picked = [x[chosen] for x in (many.responses, many.mask, many.behaviour_logprobs, many.ended)]
    return Rollout([list(p) for p in asked.prompts], index, *picked)
