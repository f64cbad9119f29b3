"""The PPO update of one round: epochs x minibatches x micro-batches, one global denominator a step."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from srppo.config import PPOConfig
from srppo.errors import TrainingStopped
from srppo.losses.policy import clipped_surrogate
from srppo.losses.value import clipped_value_loss
from srppo.memory_limit import limits
from srppo.models.over_rollout import micro_batches, padding_tokens, shares
from srppo.models.roles import Roles
from srppo.records import Experience, LossOutput, TokenBatch
from srppo.rollout.engine import mismatch
from srppo.seeding import permutation, seed_dropout
from srppo.train.compute import Compute
from srppo.train.learner import Cut, Learner, silenced
from srppo.world import deal, world

KEY = "ppo.micro_batch_tokens"


@dataclass
class UpdateLog:
    """Step metrics of a round, and how far the trainer's log-probabilities were from the engine's before the first step."""

    values: dict[str, list[float]]
    first_logprobs: list[tuple[Tensor, Tensor]]  # (behaviour, trainer) of the first minibatch
    stopped_early: bool = False

    def means(self) -> dict[str, float]:
        return {name: statistics.fmean(v) for name, v in self.values.items() if v}


def split_rows(rows: list[int], parts: int) -> list[list[int]]:
    """`parts` nearly equal runs of the list; fewer where there are fewer rows."""
    parts = min(parts, len(rows))
    return [rows[i * len(rows) // parts : (i + 1) * len(rows) // parts] for i in range(parts)]


def update(
    roles: Roles,
    experience: Experience,
    policy: Learner,
    critic: Learner | None,
    config: PPOConfig,
    *,
    seed: int,
    iteration: int,
    train_policy: bool,
    compute: Compute,
    warn: Callable[[str], None],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Move policy and critic on one round's experience. Returns metrics under TRL's names.

    The advantages, returns and old values are those of the rollout policy throughout. Rows left out (keep False) take no part.
    critic None: there is none to train by gradient steps. train_policy False trains the critic only (its warm-up).
    Raises TrainingStopped after max_skipped_steps non-finite steps in a row.
    """
    rollout = experience.rollout
    rows = torch.nonzero(experience.keep & (rollout.lengths > 0)).flatten().tolist() if train_policy or critic else []
    log = UpdateLog(defaultdict(list), [])
    total = config.epochs * min(config.minibatches, len(rows))
    done = 0
    for epoch in range(config.epochs):
        order = [rows[i] for i in permutation(len(rows), seed, "minibatches", iteration, epoch)]
        epoch_kl = []
        for minibatch in split_rows(order, config.minibatches) if rows else []:
            drawn = partial(seed_dropout, seed, "ppo", iteration, done, world().rank)
            kl = _minibatch(roles, experience, minibatch, policy, critic, config, train_policy, done == 0, drawn, compute, log)
            epoch_kl.append(kl)
            done += 1
            on_step(done, total)
            worst = max(policy.consecutive_skips, critic.consecutive_skips if critic else 0)
            if worst:
                warn(f"iteration {iteration}, step {done}: NaN or infinite loss or gradient: step skipped ({worst} in a row)")
            if worst >= config.max_skipped_steps:
                raise TrainingStopped(
                    f"iteration {iteration}: {worst} steps in a row had a NaN or infinite loss or gradient. "
                    "Lower ppo.learning_rate or ppo.critic_learning_rate, set reward.token_clip, or use model.dtype float32"
                )
        if config.target_kl is not None and train_policy and epoch_kl and world().share(statistics.fmean(epoch_kl) > config.target_kl):
            log.stopped_early = epoch + 1 < config.epochs
            break
    out = log.means() | {"policy/steps": float(done if train_policy else 0), "policy/kl_stopped": float(log.stopped_early)}
    if log.values["val/ratio"]:
        out["val/ratio_var"] = statistics.pvariance(log.values["val/ratio"])
    out["policy/skipped_steps"] = float(policy.total_skips)
    if critic:
        out["critic/skipped_steps"] = float(critic.total_skips)
    if done and train_policy:
        everyone = [pair for pairs in world().gather(log.first_logprobs) for pair in pairs]
        behaviour, trainer = (torch.cat(side) for side in zip(*everyone))
        out |= {f"rollout/{k}": v for k, v in mismatch(behaviour, trainer, torch.ones_like(trainer, dtype=torch.bool)).items()}
    return out


def fit_critic(roles: Roles, experience: Experience, warn: Callable[[str], None]) -> dict[str, float]:
    """Fit a critic without a trunk to the round's features and returns, for the next round (rows left out take no part).

    loss/value_avg is that of the values before the fit, without a clip; timing/critic in seconds.
    """
    begun = time.perf_counter()
    assert experience.features is not None, "scored without features"
    mask = experience.rollout.mask
    rows = torch.nonzero(experience.keep & mask.any(1)).flatten().tolist()
    if not rows:  # the round's own warning says why
        return {}
    returns = [x[m] for x, m in zip(experience.returns, mask)]
    mine = set(shares(experience.rollout)[world().rank])
    if not roles.fit_critic(experience.features, [r for r in rows if r in mine], returns):
        warn("NaN or infinite features or returns: the critic was not fitted in this round")
    missed = (experience.old_values - experience.returns)[rows][mask[rows]]
    return {"loss/value_avg": float(missed.square().mean()) / 2, "timing/critic": time.perf_counter() - begun}


def _minibatch(
    roles: Roles,
    experience: Experience,
    minibatch: list[int],
    policy: Learner,
    critic: Learner | None,
    config: PPOConfig,
    train_policy: bool,
    first: bool,
    drawn: Callable[[str], None],
    compute: Compute,
    log: UpdateLog,
) -> float:
    """One optimizer step of each learner on a minibatch. drawn: seeds dropout for a role. Returns its approximate KL, nats a token."""
    rollout, device, here = experience.rollout, roles.device, world()
    denominator = int(rollout.lengths[minibatch].sum())
    costs = [len(rollout.prompt_ids[r]) + n for r, n in zip(minibatch, rollout.lengths[minibatch].tolist())]
    mine = [minibatch[i] for i in deal(costs, here.size)[here.rank]]
    first_logprobs: list[tuple[Tensor, Tensor]] = []

    def cut(size: int) -> list[tuple[list[int], TokenBatch]]:
        return micro_batches(roles, rollout, size, mine, experience.prefixes)

    count = len(cut(limits.size(KEY, config.micro_batch_tokens))) if roles.spread else 0
    silent = here.most(count) - count if roles.spread else 0
    passes = train_policy + (critic is not None)
    compute.trained_tokens += passes * sum(costs)
    compute.padding_tokens += passes * padding_tokens(roles, rollout, config.micro_batch_tokens, minibatch)

    def flat(x: Tensor, rows: list[int]) -> Tensor:
        return x[rows][rollout.mask[rows]].to(device)

    def policy_loss(rows: list[int], batch: TokenBatch) -> LossOutput:
        scores = roles.score("policy", batch, train=True, entropy=config.entropy)
        if first:
            first_logprobs.append((flat(rollout.behaviour_logprobs, rows).cpu(), scores.logprobs.detach().cpu()))
        out = clipped_surrogate(scores.logprobs, flat(experience.old_logprobs, rows), flat(experience.advantages, rows), config.clip)
        if scores.entropy is None:
            return out
        return LossOutput(out.loss, {**out.metrics, "entropy": scores.entropy.detach().sum()})

    def value_loss(rows: list[int], batch: TokenBatch) -> LossOutput:
        values = roles.values(batch, train=True)
        return clipped_value_loss(values, flat(experience.old_values, rows), flat(experience.returns, rows), config.value_clip)

    def work(role: str, loss: Callable[[list[int], TokenBatch], LossOutput]) -> Cut:
        def losses(size: int) -> list[Callable[[], LossOutput]]:
            drawn(role)
            first_logprobs.clear()
            own = [partial(loss, *micro) for micro in cut(size)]
            spare = micro_batches(roles, rollout, size, minibatch[:1]) * silent  # all run a spread model as often as each other
            return [*own, *(silenced(partial(loss, *micro)) for micro in spare)]

        return Cut(KEY, config.micro_batch_tokens, max((costs[minibatch.index(r)] for r in mine), default=1), losses)

    approx_kl = 0.0
    if train_policy:
        step = policy.step(work("policy", policy_loss), denominator)
        log.first_logprobs += first_logprobs[: len(first_logprobs) - silent]
        approx_kl = step.metrics["approxkl"]
        log.values["loss/policy_avg"].append(step.loss)
        log.values["policy/approxkl_avg"].append(approx_kl)
        log.values["policy/approxkl_k3_avg"].append(step.metrics["approxkl_k3"])
        log.values["policy/clipfrac_avg"].append(step.metrics["clipfrac"])
        if "entropy" in step.metrics:
            log.values["policy/entropy_avg"].append(step.metrics["entropy"])
        log.values["policy/grad_norm"].append(step.grad_norm)
        log.values["val/ratio"].append(step.metrics["ratio"])
    if critic is None:
        return approx_kl
    step = critic.step(work("critic", value_loss), denominator)
    log.values["loss/value_avg"].append(step.loss)
    log.values["val/clipfrac_avg"].append(step.metrics["clipfrac"])
    log.values["critic/grad_norm"].append(step.grad_norm)
    return approx_kl
