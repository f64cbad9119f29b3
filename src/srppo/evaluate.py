"""Evaluation of one role: sampled and greedy scores with intervals, lengths, EOS rate, and retention of what the base could do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from srppo.intervals import bootstrap_interval
from srppo.records import Prompt, Rollout
from srppo.rollout.engine import RolloutEngine, Sampling, repeated
from srppo.scoring import Scorer
from srppo.world import world

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GroupResult:
    """One group of prompts. Scores are None without a scorer; intervals are 95 % bootstrap percentiles over prompts."""

    sampled: float | None  # mean score of samples at temperature 1
    sampled_low: float | None
    sampled_high: float | None
    greedy: float | None  # mean score of the greedy answers
    greedy_low: float | None
    greedy_high: float | None
    mean_length: float  # tokens of the samples, EOS included
    greedy_mean_length: float
    eos_rate: float  # share of the samples that end before the limit
    n: int  # prompts
    samples: int  # samples a prompt


@dataclass(frozen=True)
class Answers:
    """What a role said to one prompt, and what it was worth. Scores are None without a scorer."""

    group: str
    row: int  # of the prompt in its source
    prompt: str
    sampled: list[str]
    sampled_scores: list[float] | None
    greedy: str
    greedy_score: float | None
    lengths: list[int]  # tokens of the samples


@dataclass(frozen=True)
class Evaluation:
    groups: dict[str, GroupResult]
    rows: list[Answers]  # one a prompt

    def to_dict(self) -> dict[str, dict[str, object]]:
        return {name: asdict(result) for name, result in self.groups.items()}


def limit_per_group(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of each group, in order."""
    counts: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        counts[prompt.group] = counts.get(prompt.group, 0) + 1
        if limit is None or counts[prompt.group] <= limit:
            kept.append(prompt)
    return kept


class Models(Protocol):
    """What answers by the name of a role: Roles, or a model in their place."""

    def use(self, role: str) -> AbstractContextManager[PreTrainedModel]: ...


def evaluate(
    roles: Models,
    role: str,
    prompts: Sequence[Prompt],
    *,
    scorer: Scorer | None,
    engine: RolloutEngine,
    decode: Callable[[list[int]], str],
    max_new_tokens: int,
    samples: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Sample (temperature 1) and decode greedily from a role on every prompt and score the answers, group by group.

    The random streams depend on seed, prompt and sample only: roles are compared on common random numbers.
    """
    asked, seeds, index = repeated([p.ids for p in prompts], samples, seed, "evaluate")
    every = list(range(len(prompts)))
    total = len(index) + len(every)

    def progress_from(start: int) -> Callable[[int, int], None]:
        return lambda done, _: on_progress(start + done, total) if on_progress else None

    with roles.use(role) as model:
        sampled = engine.generate(model, asked, seeds, Sampling(max_new_tokens), index, progress_from(0))
        greedy = engine.generate(
            model,
            [p.ids for p in prompts],
            [0] * len(prompts),
            Sampling(max_new_tokens, greedy=True),
            every,
            progress_from(len(index)),
        )
    rows = world().once(lambda: _answers(prompts, sampled, greedy, samples, scorer, decode))  # the user's code runs in one process
    return Evaluation(_groups(prompts, rows, sampled, greedy, samples), rows)


def _answers(
    prompts: Sequence[Prompt], sampled: Rollout, greedy: Rollout, samples: int, scorer: Scorer | None, decode: Callable[[list[int]], str]
) -> list[Answers]:
    rows = []
    for i, prompt in enumerate(prompts):
        own = list(range(i * samples, (i + 1) * samples))
        texts = [decode(sampled.response_ids(r)) for r in own]
        greedy_text = decode(greedy.response_ids(i))
        rows.append(
            Answers(
                group=prompt.group,
                row=prompt.row,
                prompt=prompt.text,
                sampled=texts,
                sampled_scores=[scorer(t, prompt.fields) for t in texts] if scorer else None,
                greedy=greedy_text,
                greedy_score=scorer(greedy_text, prompt.fields) if scorer else None,
                lengths=sampled.lengths[own].tolist(),
            )
        )
    return rows


def _groups(prompts: Sequence[Prompt], rows: Sequence[Answers], sampled: Rollout, greedy: Rollout, samples: int) -> dict[str, GroupResult]:
    out = {}
    for name in dict.fromkeys(p.group for p in prompts):
        own = [i for i, p in enumerate(prompts) if p.group == name]
        samples_of = [r for i in own for r in range(i * samples, (i + 1) * samples)]
        sample_means = [float(np.mean(scores)) for i in own if (scores := rows[i].sampled_scores) is not None]
        greedy_scores = [score for i in own if (score := rows[i].greedy_score) is not None]
        scored = bool(greedy_scores)
        low, high = bootstrap_interval(sample_means) if scored else (None, None)
        greedy_low, greedy_high = bootstrap_interval(greedy_scores) if scored else (None, None)
        out[name] = GroupResult(
            sampled=float(np.mean(sample_means)) if scored else None,
            sampled_low=low,
            sampled_high=high,
            greedy=float(np.mean(greedy_scores)) if scored else None,
            greedy_low=greedy_low,
            greedy_high=greedy_high,
            mean_length=float(sampled.lengths[samples_of].float().mean()),
            greedy_mean_length=float(greedy.lengths[own].float().mean()),
            eos_rate=float(sampled.ended[samples_of].float().mean()),
            n=len(own),
            samples=samples,
        )
    return out


def lost_and_gained(base: Evaluation, model: Evaluation) -> dict[str, dict[str, float]]:
    """Retention by group, from greedy answers (right: a score above 0.5).

    lost: of the prompts the base gets right, the share the model no longer does. gained: of the others, the share it now does.
    base_right: how many the base gets right. Empty without a scorer.
    """
    out: dict[str, dict[str, float]] = {}
    for name in base.groups:
        pairs = [
            (before.greedy_score > 0.5, after.greedy_score > 0.5)
            for before, after in zip(base.rows, model.rows, strict=True)
            if before.group == name and before.greedy_score is not None and after.greedy_score is not None
        ]
        if pairs:
            knew = [right for known, right in pairs if known]
            unknown = [right for known, right in pairs if not known]
            out[name] = {
                "lost": 1 - sum(knew) / len(knew) if knew else 0.0,
                "gained": sum(unknown) / len(unknown) if unknown else 0.0,
                "base_right": float(len(knew)),
            }
    return out
