"""The on-policy loop of Self-Rewarding PPO: rounds of rollout, scoring and update, with checkpoints that continue exactly."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from srppo.config import RunConfig
from srppo.errors import TrainingStopped
from srppo.masking import masked_sum
from srppo.methods.rlhf import preference_reward
from srppo.methods.srppo import coherent_reward, first_beta, next_beta
from srppo.models.over_rollout import role_logprobs, rollout_tokens
from srppo.models.preference_model import PreferenceModel
from srppo.models.roles import Roles
from srppo.progress import Progress
from srppo.records import Prompt, Rollout
from srppo.rewards import CoherentReward, PreferenceReward
from srppo.rollout.engine import RolloutEngine, Sampling
from srppo.run_folder import RunFolder
from srppo.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, saved_steps
from srppo.train.compute import Compute
from srppo.train.experience import Judged, ValueScale, collect, deal_prompts, judge, make_experience, round_metrics, score
from srppo.train.guard import Guard
from srppo.train.interrupt import Interrupt, Interrupted, StopRequested
from srppo.train.learner import Learner, scheduled_lr
from srppo.train.update import update

SAMPLES_KEPT = 8  # rollouts a round written to samples.jsonl


@dataclass
class PPOState:
    """What changes over the rounds beside the weights."""

    policy: Learner
    critic: Learner | None  # None with baseline group
    beta: float  # KL coefficient of the next round
    iteration: int = 0  # finished rounds
    episodes: int = 0
    scale: ValueScale | None = None  # the critic's units, from the first round
    guard: Guard | None = None

    @property
    def learners(self) -> list[Learner]:
        return [self.policy, self.critic] if self.critic else [self.policy]


def train_ppo(
    roles: Roles,
    prompts: Sequence[Prompt],
    config: RunConfig,
    *,
    engine: RolloutEngine,
    sampling: Sampling,
    run: RunFolder,
    progress: Progress,
    compute: Compute,
    interrupt: Interrupt,
    decode: Callable[[list[int]], str],
    evaluate: Callable[[int], dict[str, float]],
    guard: Guard | None = None,
    preference_model: PreferenceModel | None = None,
) -> PPOState:
    """Train the role `policy` (a copy of `sft`) and the critic; both are left at their last state, the policy at the guard's choice.

    Resumes from checkpoints/ppo/ when that holds a checkpoint. evaluate(iteration) gives metrics to log with the round.
    guard: watches the policy and may end the rounds early; None, or a run begun by a version without it: all rounds, the last policy.
    preference_model: judges the responses in place of the coherent reward.
    Raises Interrupted after saving, and TrainingStopped (state saved) on repeated non-finite steps.
    """
    ppo = config.ppo
    folder = run.path / "checkpoints" / "ppo"
    roles.create("policy", "sft")
    learned = ppo.baseline == "critic"
    if learned:
        roles.create_critic("sft")
    roles.freeze("sft")  # after the copies were taken from its full precision
    state = PPOState(
        Learner(roles.parameters("policy"), ppo.learning_rate, ppo.max_grad_norm, epsilon=ppo.adam_epsilon),
        Learner(roles.critic_parameters(), ppo.critic_learning_rate, ppo.max_grad_norm, epsilon=ppo.adam_epsilon) if learned else None,
        first_beta(config.reward),
        guard=guard,
    )
    steps = saved_steps(folder)
    if steps:
        _restore(roles, state, compute, load_checkpoint(folder, steps[-1]))
    elif state.guard:
        state.guard.begin(None)
    run.truncate_metrics(state.iteration if steps else -1, "ppo")
    reward = coherent_reward(config.reward) if preference_model is None else preference_reward(config.reward)

    def save() -> None:
        save_checkpoint(folder, _checkpoint(roles, state, compute), ppo.keep_checkpoints)
        if state.guard:
            state.guard.tidy()

    def over() -> bool:
        return state.iteration >= ppo.iterations or (state.guard is not None and state.guard.gives_up)

    try:
        with progress.stage("PPO", ppo.iterations, "rounds", state.iteration) as ticker:
            if state.guard and not state.guard.looks:  # at the SFT; a record of its own, as there is no round
                run.log({"stage": "ppo", "step": 0, **state.guard.look(0)})
            while not over():
                interrupt.check()
                iteration = state.iteration + 1
                dealt = [prompts[i] for i in deal_prompts(len(prompts), ppo.prompts_per_iteration, config.seed, iteration)]
                metrics = _round(
                    roles, dealt, config, sampling, reward, preference_model, state, engine, run, progress, compute, interrupt, decode
                )
                every = config.evaluation.every
                if every and iteration % every == 0 and iteration < ppo.iterations:
                    metrics |= evaluate(iteration)
                if state.guard and state.guard.due(iteration):
                    metrics |= state.guard.look(iteration)
                run.log({"stage": "ppo", "iteration": iteration, **metrics})
                ticker.advance(iteration, **_shown(metrics))
                if over() or (ppo.checkpoint_every and iteration % ppo.checkpoint_every == 0):
                    save()
    except StopRequested:
        save()
        raise Interrupted(
            f"stopped after PPO round {state.iteration} of {ppo.iterations}; the state is saved: continue with --resume"
        ) from None
    except TrainingStopped as stop:
        _save_stopped(run, roles, state, compute)
        raise TrainingStopped(
            f"{stop}. The state is in {run.path / 'checkpoints/stopped'}; --resume goes on from the last checkpoint before it"
        ) from None
    if state.guard:
        state.guard.conclude(state.iteration)
    return state


def _round(
    roles: Roles,
    dealt: Sequence[Prompt],
    config: RunConfig,
    sampling: Sampling,
    reward: CoherentReward | PreferenceReward,
    preference_model: PreferenceModel | None,
    state: PPOState,
    engine: RolloutEngine,
    run: RunFolder,
    progress: Progress,
    compute: Compute,
    interrupt: Interrupt,
    decode: Callable[[list[int]], str],
) -> dict[str, float]:
    """One round. Nothing changes before the update, so a stop until then leaves the state of the round before; after, it is finished."""
    ppo, iteration = config.ppo, state.iteration + 1
    clock, spent = [time.perf_counter()], Compute()  # counted when the round is finished: a stopped one is done again
    rollout = collect(roles, engine, dealt, sampling, ppo.samples_per_prompt, config.seed, iteration, spent, lambda *_: interrupt.check())
    clock.append(time.perf_counter())
    scored = score(roles, rollout, config, spent, interrupt.check, preference_model)
    old = None
    if ppo.behaviour_logprobs == "recompute":
        old = role_logprobs(roles, "policy", rollout, ppo.micro_batch_size)
        spent.forward_tokens += rollout_tokens(rollout)
    judged = judge(scored, reward, state.beta, old)
    scale = state.scale or ValueScale.of(judged.returns[judged.reward.keep])
    experience = make_experience(scored, judged, state.beta, scale, config)
    metrics = round_metrics(judged, experience, state.beta, scale)
    if not experience.keep.any():
        progress.warn(
            f"iteration {iteration}: every rollout was cut at the length limit and left out (reward.missing_eos: exclude), so nothing "
            "was trained; raise rollout.max_new_tokens, or use another reward.missing_eos"
        )
    clock.append(time.perf_counter())
    interrupt.check()
    lr = scheduled_lr(ppo.lr_schedule, state.iteration, ppo.iterations, ppo.learning_rate)
    critic_lr = scheduled_lr(ppo.lr_schedule, state.iteration, ppo.iterations, ppo.critic_learning_rate)
    state.policy.set_lr(lr)
    if state.critic:
        state.critic.set_lr(critic_lr)
    train_policy = state.critic is None or iteration > ppo.critic_warmup
    metrics |= update(
        roles,
        experience,
        state.policy,
        state.critic,
        ppo,
        seed=config.seed,
        iteration=iteration,
        train_policy=train_policy,
        compute=spent,
        warn=progress.warn,
    )
    clock.append(time.perf_counter())
    state.iteration = iteration
    if experience.keep.any():  # else the next round sets the units
        state.scale = scale
    compute.add(spent)
    state.episodes += len(rollout.prompt_ids)
    beta = state.beta
    if train_policy:
        state.beta = next_beta(config.reward, beta, metrics["objective/kl"], len(rollout.prompt_ids))
    seconds = {name: b - a for name, a, b in zip(("rollout", "score", "update"), clock, clock[1:])}
    run.samples(iteration, _samples(dealt, judged, rollout, decode))
    return metrics | {
        "objective/beta": beta,
        "lr": lr if train_policy else 0.0,
        **({"critic/lr": critic_lr} if state.critic else {}),
        "episode": float(state.episodes),
        "compute/passes": float(compute.passes),
        "tokens_per_second": float(rollout.mask.sum()) / max(sum(seconds.values()), 1e-9),
        "rollout/tokens_per_second": float(rollout.mask.sum()) / max(seconds["rollout"], 1e-9),
        **{f"timing/{name}": value for name, value in seconds.items()},
    }


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    """What the progress line says of a round."""
    scores = [v for k, v in metrics.items() if k.endswith("/sampled")]
    accuracy = {"accuracy": sum(scores) / len(scores)} if scores else {}
    return {k: metrics[k] for k in ("objective/scores", "objective/kl", "completions/mean_length")} | accuracy


def _samples(dealt: Sequence[Prompt], judged: Judged, rollout: Rollout, decode: Callable[[list[int]], str]) -> list[dict[str, object]]:
    """The first rollouts of a round, readable."""
    return [
        {
            "prompt": dealt[rollout.prompt_index[row]].text,
            "group": dealt[rollout.prompt_index[row]].group,
            "response": decode(rollout.response_ids(row)),
            "score": float(judged.reward.scores[row]),
            "kl": float(masked_sum(judged.kl[row], rollout.mask[row])),
            "length": int(rollout.lengths[row]),
            "ended": bool(rollout.ended[row]),
        }
        for row in range(min(SAMPLES_KEPT, len(rollout.prompt_ids)))
    ]


def _checkpoint(roles: Roles, state: PPOState, compute: Compute) -> Checkpoint:
    tensors = {"policy": roles.state("policy"), "policy-optimizer": state.policy.state()}
    if state.critic:
        tensors |= {"critic": roles.critic_state(), "critic-optimizer": state.critic.state()}
    content = {
        "episodes": state.episodes,
        "beta": state.beta,
        "value_scale": None if state.scale is None else [state.scale.mean, state.scale.std],
        "forward_tokens": compute.forward_tokens,
        "trained_tokens": compute.trained_tokens,
        "skips": [[s.consecutive_skips, s.total_skips] for s in state.learners],
        "guard": state.guard.state() if state.guard else None,
    }
    return Checkpoint(state.iteration, tensors, content)


def _restore(roles: Roles, state: PPOState, compute: Compute, saved: Checkpoint) -> None:
    roles.load_state("policy", saved.tensors["policy"])
    state.policy.load_state(saved.tensors["policy-optimizer"])
    if state.critic:
        roles.load_critic_state(saved.tensors["critic"])
        state.critic.load_state(saved.tensors["critic-optimizer"])
    state.iteration, state.episodes = saved.step, saved.state["episodes"]
    state.beta = saved.state["beta"]
    state.scale = ValueScale(*saved.state["value_scale"]) if saved.state["value_scale"] else None
    compute.forward_tokens, compute.trained_tokens = saved.state["forward_tokens"], saved.state["trained_tokens"]
    for learner, (consecutive, total) in zip(state.learners, saved.state["skips"], strict=True):
        learner.consecutive_skips, learner.total_skips = consecutive, total
    if saved.state.get("guard") is None:
        state.guard = None  # begun by a version without one: goes on as it began
    elif state.guard:
        state.guard.begin(saved.state["guard"])


def _save_stopped(run: RunFolder, roles: Roles, state: PPOState, compute: Compute) -> None:
    """After repeated non-finite steps: keep the state for inspection beside the checkpoints, which stay the way to resume."""
    folder = run.path / "checkpoints" / "stopped"
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(folder, _checkpoint(roles, state, compute), keep=1)
