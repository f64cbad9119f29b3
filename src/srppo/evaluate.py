"""Evaluation of one role: sampled and greedy scores with intervals, lengths, EOS rate, and retention of what the base could do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from srppo.models.roles import Roles
from srppo.records import Prompt, Rollout
from srppo.rollout.engine import RolloutEngine, Sampling
from srppo.scoring import Scorer
from srppo.seeding import stream_seed

BOOTSTRAP_DRAWS = 2000


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
class Evaluation:
    groups: dict[str, GroupResult]
    rows: list[dict[str, object]]  # one a prompt: what was asked, answered and scored

    def to_dict(self) -> dict[str, dict[str, object]]:
        return {name: asdict(result) for name, result in self.groups.items()}


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron 1979) of per-prompt scores."""
    x = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(x), size=(BOOTSTRAP_DRAWS, len(x)))
    low, high = np.quantile(x[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def limit_per_group(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of each group, in order."""
    counts: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        counts[prompt.group] = counts.get(prompt.group, 0) + 1
        if limit is None or counts[prompt.group] <= limit:
            kept.append(prompt)
    return kept


def evaluate(
    roles: Roles,
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
    index = [i for i in range(len(prompts)) for _ in range(samples)]
    seeds = [stream_seed(seed, "evaluate", i, s) for i in range(len(prompts)) for s in range(samples)]
    every = list(range(len(prompts)))
    total = len(index) + len(every)

    def progress_from(start: int) -> Callable[[int, int], None]:
        return lambda done, _: on_progress(start + done, total) if on_progress else None

    with roles.use(role) as model:
        sampled = engine.generate(model, [prompts[i].ids for i in index], seeds, Sampling(max_new_tokens), index, progress_from(0))
        greedy = engine.generate(
            model,
            [p.ids for p in prompts],
            [0] * len(prompts),
            Sampling(max_new_tokens, greedy=True),
            every,
            progress_from(len(index)),
        )
    rows = []
    for i, prompt in enumerate(prompts):
        own = list(range(i * samples, (i + 1) * samples))
        texts = [decode(sampled.response_ids(r)) for r in own]
        greedy_text = decode(greedy.response_ids(i))
        rows.append(
            {
                "group": prompt.group,
                "row": prompt.row,
                "prompt": prompt.text,
                "sampled": texts,
                "sampled_scores": [scorer(t, prompt.fields) for t in texts] if scorer else None,
                "greedy": greedy_text,
                "greedy_score": scorer(greedy_text, prompt.fields) if scorer else None,
                "lengths": sampled.lengths[own].tolist(),
            }
        )
    return Evaluation(_groups(prompts, rows, sampled, greedy, samples), rows)


def _groups(
    prompts: Sequence[Prompt], rows: Sequence[dict[str, object]], sampled: Rollout, greedy: Rollout, samples: int
) -> dict[str, GroupResult]:
    out = {}
    for name in dict.fromkeys(p.group for p in prompts):
        own = [i for i, p in enumerate(prompts) if p.group == name]
        samples_of = [r for i in own for r in range(i * samples, (i + 1) * samples)]
        scored = rows[own[0]]["greedy_score"] is not None
        sample_means = [float(np.mean(rows[i]["sampled_scores"])) for i in own] if scored else []  # type: ignore[arg-type]
        greedy_scores = [float(rows[i]["greedy_score"]) for i in own] if scored else []  # type: ignore[arg-type]
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
    """Retention by group: of the prompts the base answers greedily right (score above 0.5), the share the model no longer does; and gained, of the others.

    Empty without a scorer.
    """
    out: dict[str, dict[str, float]] = {}
    for name in base.groups:
        pairs = [
            (float(b["greedy_score"]) > 0.5, float(m["greedy_score"]) > 0.5)  # type: ignore[arg-type]
            for b, m in zip(base.rows, model.rows)
            if b["group"] == name and b["greedy_score"] is not None
        ]
        if pairs:
            knew = [after for before, after in pairs if before]
            not_known = [after for before, after in pairs if not before]
            out[name] = {
                "lost": 1 - sum(knew) / len(knew) if knew else 0.0,
                "gained": sum(not_known) / len(not_known) if not_known else 0.0,
                "base_right": float(len(knew)),
            }
    return out


def paired_gain(before: Sequence[dict[str, object]], after: Sequence[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Mean sampled-score difference after - before on the same prompts, by group, with its 95 % bootstrap interval over prompts.

    Paired: the difference is taken prompt by prompt, so what makes a prompt hard cancels. Empty without scores.
    """
    out: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(str(r["group"]) for r in before):
        gaps = [
            float(np.mean(b["sampled_scores"])) - float(np.mean(a["sampled_scores"]))  # type: ignore[arg-type]
            for a, b in zip(before, after, strict=True)
            if a["group"] == name and a["sampled_scores"] is not None
        ]
        if gaps:
            low, high = bootstrap_interval(gaps)
            out[name] = {"gain": float(np.mean(gaps)), "low": low, "high": high, "n": float(len(gaps))}
    return out
