"""The on-policy loop of Self-Rewarding PPO: rounds of rollout, scoring and update, with checkpoints that continue exactly."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from srppo.allocator import give_back
from srppo.config import RunConfig
from srppo.errors import TrainingStopped
from srppo.masking import masked_sum
from srppo.memory_limit import limits
from srppo.methods.rlhf import preference_reward
from srppo.methods.srppo import coherent_reward, first_beta, next_beta
from srppo.models.over_rollout import role_logprobs, rollout_tokens
from srppo.models.preference_model import PreferenceModel
from srppo.models.roles import Roles
from srppo.profiling.phases import Phases
from srppo.profiling.trace import traced
from srppo.profiling.traffic import Traffic, counted
from srppo.progress import Progress
from srppo.records import Experience, Prompt
from srppo.rewards import CoherentReward, PreferenceReward
from srppo.rollout.engine import EngineLost, RolloutEngine, Sampling
from srppo.run_folder import RunFolder
from srppo.train.checkpoint import Checkpoint, load_latest, save_checkpoint
from srppo.train.compute import Compute
from srppo.train.experience import Judged, ValueScale, collect, deal_prompts, judge, make_experience, round_metrics, score
from srppo.train.guard import Guard
from srppo.train.interrupt import Interrupt, Interrupted, StopRequested
from srppo.train.learner import scheduled_lr
from srppo.train.saver import Saver
from srppo.train.speed import TimedLearner, rates, snapshot
from srppo.train.update import fit_critic, update
from srppo.world import world

SAMPLES_KEPT = 8  # rollouts a round written to samples.jsonl


@dataclass(frozen=True)
class PPOSetup:
    """What the rounds are run with, the same in all of them."""

    roles: Roles
    prompts: Sequence[Prompt]
    config: RunConfig
    engine: RolloutEngine
    sampling: Sampling
    run: RunFolder
    progress: Progress
    compute: Compute  # what finished rounds cost is added here
    interrupt: Interrupt
    decode: Callable[[list[int]], str]
    preference_model: PreferenceModel | None = None  # judges the responses in place of the coherent reward

    @property
    def reward(self) -> CoherentReward | PreferenceReward:
        return coherent_reward(self.config.reward) if self.preference_model is None else preference_reward(self.config.reward)


@dataclass
class PPOState:
    """What changes over the rounds beside the weights."""

    policy: TimedLearner
    critic: TimedLearner | None  # None with baseline group, and where the critic is fitted
    beta: float  # KL coefficient of the next round
    phases: Phases  # what the round costs
    iteration: int = 0  # finished rounds
    logged: int = 0  # those with their record in metrics.jsonl
    episodes: int = 0
    scale: ValueScale | None = None  # the critic's units, from the first round
    guard: Guard | None = None

    @property
    def learners(self) -> list[TimedLearner]:
        return [self.policy, self.critic] if self.critic else [self.policy]


@dataclass(frozen=True)
class Gathered:
    """What a round learns from."""

    dealt: Sequence[Prompt]
    judged: Judged
    experience: Experience
    scale: ValueScale  # the critic's units in this round
    collected: Compute  # the rollouts' cost
    spent: Compute  # that and the scoring's


def train_ppo(setup: PPOSetup, *, evaluate: Callable[[int], dict[str, float]], guard: Guard | None = None) -> PPOState:
    """Train the role `policy` (a copy of `sft`) and the critic; both are left at their last state, the policy at the guard's choice.

    Resumes from checkpoints/ppo/ when that holds a checkpoint. evaluate(iteration) gives metrics to log with the round.
    guard: watches the policy and may end the rounds early; None, or a run begun by a version without it: all rounds, the last policy.
    Raises Interrupted after saving, and TrainingStopped (state saved) on repeated non-finite steps.
    """
    roles, config, run, ppo = setup.roles, setup.config, setup.run, setup.config.ppo
    folder = run.path / "checkpoints" / "ppo"
    roles.create("policy", "sft")
    learned = ppo.baseline == "critic"
    if learned:
        roles.create_critic("sft", trunk=config.tuning.critic == "own")
    roles.freeze("sft")  # after the copies were taken from its full precision
    state = PPOState(
        TimedLearner(roles.parameters("policy"), ppo.learning_rate, ppo.max_grad_norm, epsilon=ppo.adam_epsilon),
        TimedLearner(roles.critic_parameters(), ppo.critic_learning_rate, ppo.max_grad_norm, epsilon=ppo.adam_epsilon)
        if learned and roles.critic_has_trunk
        else None,
        first_beta(config.reward),
        Phases(roles.device),
        guard=guard,
    )
    resumed = _resume(setup, state, folder)
    run.truncate_metrics(state.iteration if resumed else -1, "ppo")

    traffic = Traffic()
    with (
        nullcontext() if world().alone else counted(traffic),
        Saver(folder, ppo.keep_checkpoints, config.background_checkpoints) as saver,
    ):
        try:
            _rounds(setup, state, evaluate, saver, traffic)
        except StopRequested:
            _save(setup, state, saver)
            saver.wait()
            raise Interrupted(
                f"stopped after PPO round {state.iteration} of {ppo.iterations}; the state is saved: continue with --resume"
            ) from None
        except EngineLost as lost:
            if state.iteration == state.logged:  # lost while sampling the next round, of which nothing is kept
                _save(setup, state, saver)
                saver.wait()
            raise EngineLost(f"PPO stopped after round {state.logged} of {ppo.iterations}: {lost}") from None
        except TrainingStopped as stop:
            _save_stopped(setup, state)
            raise TrainingStopped(
                f"{stop}. The state is in {run.path / 'checkpoints/stopped'}; --resume goes on from the last checkpoint before it"
            ) from None
    if state.guard:
        state.guard.conclude(state.iteration)
    return state


def _rounds(setup: PPOSetup, state: PPOState, evaluate: Callable[[int], dict[str, float]], saver: Saver, traffic: Traffic) -> None:
    """The rounds that are left, each with its record, looks and checkpoint."""
    config, run, ppo, phases, begun_at = setup.config, setup.run, setup.config.ppo, state.phases, state.iteration

    def over() -> bool:
        return state.iteration >= ppo.iterations or (state.guard is not None and state.guard.gives_up)

    with setup.progress.stage("PPO", ppo.iterations, "rounds", begun_at) as ticker:
        if state.guard and not state.guard.looks:  # at the SFT; a record of its own, as there is no round
            with phases("guard"):
                metrics = state.guard.look(0)
            run.log({"stage": "ppo", "step": 0, **metrics, **phases.take()})
        while not over():
            setup.interrupt.check()
            saver.check()
            number = state.iteration + 1
            profiled = config.profile and world().main and number == min(begun_at + 2, ppo.iterations)  # the first warms up
            with traced(run.path / "profile", f"round-{number}", setup.progress.warn) if profiled else nullcontext():
                metrics = _round(setup, state)
            iteration, every = state.iteration, config.evaluation.every
            if every and iteration % every == 0 and iteration < ppo.iterations:
                with phases("evaluate"):
                    metrics |= evaluate(iteration)
            if state.guard and state.guard.due(iteration):
                saver.wait()  # the guard keeps what the checkpoints on disk need
                with phases("guard"):
                    metrics |= state.guard.look(iteration)
            limits.hear(world().gather(limits.news()))
            metrics |= phases.take() | limits.metrics() | ({"timing/profiled": 1.0} if profiled else {})
            metrics |= {} if world().alone else traffic.take()
            run.log({"stage": "ppo", "iteration": iteration, **metrics})
            state.logged = iteration
            ticker.advance(iteration, **_shown(metrics))
            if over() or (ppo.checkpoint_every and iteration % ppo.checkpoint_every == 0):
                _save(setup, state, saver)


def _save(setup: PPOSetup, state: PPOState, saver: Saver) -> None:
    with state.phases("checkpoint"):
        saver.save(_checkpoint(setup, state))
    if state.guard:
        state.guard.tidy()


def _round(setup: PPOSetup, state: PPOState) -> dict[str, float]:
    """One round. Nothing changes before the update, so a stop until then leaves the state of the round before; after, it is finished."""
    gathered = _gather(setup, state)
    setup.interrupt.check()
    fitted: dict[str, float] = {}
    if gathered.experience.features is not None:
        with state.phases("update"):
            fitted = fit_critic(setup.roles, gathered.experience, setup.progress.warn)
        gathered = replace(gathered, experience=replace(gathered.experience, features=None))  # makes room for the update
    return _learn(setup, state, gathered) | fitted


@contextmanager
def _roomy(roles: Roles) -> Iterator[None]:
    """A phase after which, where weights are spread to save memory, the allocator keeps none for the next."""
    yield
    if roles.spread:
        give_back()


def _gather(setup: PPOSetup, state: PPOState) -> Gathered:
    """The next round's rollouts, scored and made into experience."""
    roles, config, check, ppo, iteration = setup.roles, setup.config, setup.interrupt.check, setup.config.ppo, state.iteration + 1
    phases, spent = state.phases, Compute()  # counted when the round is finished: a stopped one is done again
    dealt = [setup.prompts[i] for i in deal_prompts(len(setup.prompts), ppo.prompts_per_iteration, config.seed, iteration)]
    samples = ppo.samples_per_prompt
    with phases("rollout"), _roomy(roles):
        rollout = collect(roles, setup.engine, dealt, setup.sampling, samples, config.seed, iteration, spent, setup.interrupt.poll)
    collected = snapshot(spent)
    with phases("score"), _roomy(roles):
        scored = score(roles, rollout, config, spent, check, setup.preference_model)
        old = None
        if ppo.behaviour_logprobs == "recompute":
            old = role_logprobs(roles, "policy", rollout, ppo.micro_batch_tokens)
            spent.forward_tokens += rollout_tokens(rollout)
        judged = judge(scored, setup.reward, state.beta, old)
        scale = state.scale or ValueScale.of(judged.returns[judged.reward.keep])
        experience = make_experience(scored, judged, state.beta, scale, config)
    return Gathered(dealt, judged, experience, scale, collected, spent)


def _learn(setup: PPOSetup, state: PPOState, gathered: Gathered) -> dict[str, float]:
    """Update policy and critic, and move the state to the end of the round. Returns the round's metrics."""
    config, ppo, iteration = setup.config, setup.config.ppo, state.iteration + 1
    judged, experience, spent, beta = gathered.judged, gathered.experience, gathered.spent, state.beta
    rollout, trainable = experience.rollout, bool(experience.keep.any())
    metrics = round_metrics(judged, experience, beta, gathered.scale)
    if not trainable:
        setup.progress.warn(
            f"iteration {iteration}: every rollout was cut at the length limit and left out (reward.missing_eos: exclude), so nothing "
            "was trained; raise rollout.max_new_tokens, or use another reward.missing_eos"
        )
    lr = scheduled_lr(ppo.lr_schedule, state.iteration, ppo.iterations, ppo.learning_rate)
    critic_lr = scheduled_lr(ppo.lr_schedule, state.iteration, ppo.iterations, ppo.critic_learning_rate)
    state.policy.set_lr(lr)
    if state.critic:
        state.critic.set_lr(critic_lr)
    train_policy = not setup.roles.has_critic or iteration > ppo.critic_warmup
    with state.phases("update"), _roomy(setup.roles):
        metrics |= update(
            setup.roles,
            experience,
            state.policy,
            state.critic,
            ppo,
            seed=config.seed,
            iteration=iteration,
            train_policy=train_policy,
            compute=spent,
            warn=setup.progress.warn,
        )
    state.iteration = iteration
    if trainable:  # else the next round sets the units
        state.scale = gathered.scale
    setup.compute.add(spent)
    state.episodes += len(rollout.prompt_ids)
    if train_policy:
        state.beta = next_beta(config.reward, beta, metrics["objective/kl"], len(rollout.prompt_ids))
    seconds = {name: state.phases.seconds(name) for name in ("rollout", "score", "update")}
    setup.run.samples(iteration, _samples(gathered, setup.decode))
    return metrics | {
        "objective/beta": beta,
        "lr": lr if train_policy else 0.0,
        **({"critic/lr": critic_lr, "timing/critic": state.critic.take_seconds()} if state.critic else {}),
        "timing/policy": state.policy.take_seconds(),
        "episode": float(state.episodes),
        "compute/passes": float(setup.compute.passes),
        **rates(int(rollout.mask.sum()), seconds, gathered.collected, spent),
    }


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    """What the progress line says of a round."""
    scores = [v for k, v in metrics.items() if k.endswith("/sampled")]
    accuracy = {"accuracy": sum(scores) / len(scores)} if scores else {}
    return {k: metrics[k] for k in ("objective/scores", "objective/kl", "completions/mean_length")} | accuracy


def _samples(gathered: Gathered, decode: Callable[[list[int]], str]) -> list[dict[str, object]]:
    """The first rollouts of a round, readable."""
    dealt, judged, rollout = gathered.dealt, gathered.judged, gathered.experience.rollout
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


def _checkpoint(setup: PPOSetup, state: PPOState) -> Checkpoint:
    roles, compute = setup.roles, setup.compute
    tensors = {"policy": roles.weights("policy"), "policy-optimizer": state.policy.state()}
    if roles.has_critic:
        tensors["critic"] = roles.critic_weights()
    if state.critic:
        tensors["critic-optimizer"] = state.critic.state()
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


def _resume(setup: PPOSetup, state: PPOState, folder: Path) -> bool:
    """Put back the last whole checkpoint, if there is one."""
    like = {"policy": setup.roles.weights("policy"), "policy-optimizer": state.policy.places()}
    if setup.roles.has_critic:
        like["critic"] = setup.roles.critic_weights()
    if state.critic:
        like["critic-optimizer"] = state.critic.places()
    saved = load_latest(folder, like, warn=setup.progress.warn)
    if saved is not None:
        _restore(setup, state, saved)
    elif state.guard:
        state.guard.begin(None)
    return saved is not None


def _restore(setup: PPOSetup, state: PPOState, saved: Checkpoint) -> None:
    roles, compute = setup.roles, setup.compute
    roles.load_state("policy", saved.tensors["policy"])
    state.policy.load_state(saved.tensors["policy-optimizer"])
    if roles.has_critic:
        roles.load_critic_state(saved.tensors["critic"])
    if state.critic:
        state.critic.load_state(saved.tensors["critic-optimizer"])
    state.iteration = state.logged = saved.step
    state.episodes = saved.state["episodes"]
    state.beta = saved.state["beta"]
    state.scale = ValueScale(*saved.state["value_scale"]) if saved.state["value_scale"] else None
    compute.forward_tokens, compute.trained_tokens = saved.state["forward_tokens"], saved.state["trained_tokens"]
    for learner, (consecutive, total) in zip(state.learners, saved.state["skips"], strict=True):
        learner.consecutive_skips, learner.total_skips = consecutive, total
    if saved.state.get("guard") is None:
        state.guard = None  # begun by a version without one: goes on as it began
    elif state.guard:
        state.guard.begin(saved.state["guard"])


def _save_stopped(setup: PPOSetup, state: PPOState) -> None:
    """After repeated non-finite steps: keep the state for inspection beside the checkpoints, which stay the way to resume."""
    folder = setup.run.path / "checkpoints" / "stopped"
    if world().main:
        shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(folder, _checkpoint(setup, state), keep=1)
