"""Forgetting measured without labels: how much less likely a model finds what the base would have said to other prompts."""

from __future__ import annotations

from collections.abc import Sequence

from srppo.masking import masked_mean, masked_sum
from srppo.models.over_rollout import role_logprobs
from srppo.models.roles import Roles
from srppo.records import Prompt, Rollout
from srppo.rollout.engine import Progress, RolloutEngine, Sampling
from srppo.seeding import stream_seed


def base_answers(
    roles: Roles, prompts: Sequence[Prompt], engine: RolloutEngine, max_new_tokens: int, seed: int, on_progress: Progress | None = None
) -> Rollout:
    """One sample of the base to each prompt, the yardstick of `forgetting`. on_progress: as RolloutEngine.generate has it."""
    seeds = [stream_seed(seed, "retention", i) for i in range(len(prompts))]
    with roles.use("base") as model:
        return engine.generate(model, [p.ids for p in prompts], seeds, Sampling(max_new_tokens), None, on_progress)


def forgetting(roles: Roles, role: str, answers: Rollout, tokens: int) -> dict[str, float]:
    """Monte-Carlo KL(base || role) on the base's own answers: nats a token and nats a response. 0 for the base itself; ours."""
    gap = role_logprobs(roles, "base", answers, tokens) - role_logprobs(roles, role, answers, tokens)
    return {
        "nats_per_token": float(masked_mean(gap, answers.mask)),
        "nats_per_response": float(masked_sum(gap, answers.mask, 1).mean()),
        "n": float(len(answers.prompt_ids)),
    }
