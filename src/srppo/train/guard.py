"""The guard: a label-free watch over over-optimisation while PPO runs, on held-out demonstrations (ours; the paper has none).

Every `guard.every` rounds it looks: how probable the tokens of held-out demonstrations are to the policy, samples of the policy on their
prompts, and whether the reward still tells the two apart. The policy of the best look is kept; looks without a better one end PPO early.
Words as in diagnose/reward_card.py: demonstration, sample, preference (AUC). Rewards and log-probabilities are nats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from srppo.config import RunConfig
from srppo.diagnose.evidence import Responses, chosen_demonstrations
from srppo.diagnose.statistics import Floats, preference
from srppo.errors import RunFolderError
from srppo.masking import masked_mean, masked_sum
from srppo.methods.rlhf import preference_reward
from srppo.methods.srppo import coherent_reward
from srppo.models.over_rollout import role_logprobs
from srppo.models.preference_model import PreferenceModel
from srppo.models.roles import Roles
from srppo.progress import Progress
from srppo.records import Example, Rollout
from srppo.rollout.engine import RolloutEngine, Sampling, repeated
from srppo.run_folder import RunFolder
from srppo.train.checkpoint import Checkpoint, checkpoint_path, drop, load_checkpoint, save_checkpoint, saved_steps
from srppo.world import world

CHECKPOINTS = "guard-best"  # under checkpoints/
AUC_DROP = 0.1  # from round 0: beyond it, or below 1/2, the reward no longer ranks demonstrations above samples as it did


@dataclass(frozen=True)
class Look:
    """What the guard saw after a round; round 0 is the SFT itself. Means over demonstrations (heldout_*) or samples."""

    round: int
    reward: float  # nats a sample
    auc: float | None  # mean over prompts of the preference; None where every sample is the demonstration
    heldout_nll: float  # of the demonstrations' response tokens, nats a token
    heldout_nll_response: float  # nats a demonstration
    match: float  # share of the samples that are the demonstration, token for token
    kl: float  # of log pi - log sft over a sample, nats
    length: float  # tokens, EOS included
    entropy: float  # of -log pi, nats a sampled token
    eos_rate: float  # share of the samples that end before the limit
    heldout_probability: float = math.nan  # of a demonstration's token given those before it; NaN in the state of an older version


def criterion(look: Look) -> float:
    """What the guard goes by, higher is better: mean probability of a held-out demonstration's token (ours).

    It is the share of their tokens that the policy would say itself, given those before. The likelihood is no guide: PPO makes the
    policy surer, and the logarithm punishes one sure mistake more than it rewards many answers set right (docs/results/guard_criteria.md).
    """
    return look.heldout_probability


def best_of(looks: Sequence[Look]) -> Look:
    """The earliest of the looks (at least one) with the highest criterion; one that is NaN is never better."""
    values = [criterion(look) for look in looks]
    return looks[max(range(len(looks)), key=lambda i: (-math.inf if math.isnan(values[i]) else values[i], -i))]


def looks_since_best(looks: Sequence[Look], warmup: int) -> int:
    """Looks after the best one. Those up to round `warmup`, in which the policy has not been trained, do not count."""
    best = best_of(looks).round if looks else 0
    return sum(look.round > max(best, warmup) for look in looks)


def alarming(looks: Sequence[Look]) -> bool:
    """Whether at the last look the reward is above the first look's and the criterion below it, while the AUC is below 1/2 or has
    dropped by more than AUC_DROP since."""
    if len(looks) < 2:
        return False
    first, now = looks[0], looks[-1]
    parted = now.reward > first.reward and criterion(now) < criterion(first)
    if not parted or now.auc is None:
        return False
    return now.auc < 0.5 or (first.auc is not None and first.auc - now.auc > AUC_DROP)


def watched(examples: Sequence[Example], roles: Roles, config: RunConfig) -> Rollout:
    """At most `guard.heldout` of the demonstrations, chosen by the seed: those with a prompt that leaves room for a response."""
    return chosen_demonstrations(examples, roles, config, config.guard.heldout, "guard")


class Guard:
    """Looks, remembers them, and keeps the best look's policy in checkpoints/guard-best/. All that changes is `looks`.

    It reads the roles and draws from random streams of its own, so PPO runs the same with it and without.
    """

    def __init__(
        self,
        roles: Roles,
        demonstrations: Rollout,
        config: RunConfig,
        *,
        engine: RolloutEngine,
        run: RunFolder,
        progress: Progress,
        preference_model: PreferenceModel | None = None,
    ):
        """demonstrations: as `watched` gives them, at least one row. preference_model: what PPO's reward is, if not the coherent one."""
        self.looks: list[Look] = []
        self._lost = False  # whether the best look's weights could not be read at the end
        self._roles, self._demonstrations, self._config = roles, demonstrations, config
        self._engine, self._run, self._progress, self._preference_model = engine, run, progress, preference_model
        self._folder = run.path / "checkpoints" / CHECKPOINTS
        self._warmup = config.ppo.critic_warmup if config.ppo.baseline == "critic" else 0

    def due(self, round: int) -> bool:
        return round % self._config.guard.every == 0 or round == self._config.ppo.iterations

    @property
    def gives_up(self) -> bool:
        """Whether PPO should stop here."""
        return self._config.guard.stop and looks_since_best(self.looks, self._warmup) >= self._config.guard.patience

    def look(self, round: int) -> dict[str, float]:
        """Look at the role `policy` after a round, keep its weights where it is the best so far, and return the metrics.

        No stop in here: the round's weights have moved, and its record is written after this. Raises RunFolderError on a full disk.
        """
        started, known = time.perf_counter(), any(alarming(self.looks[: i + 1]) for i in range(len(self.looks)))
        now = world().share(self._see(round))  # what is decided by it is decided alike
        self.looks.append(now)
        if best_of(self.looks) is now and self._config.guard.keep == "best":
            weights = Checkpoint(round, {"policy": self._roles.weights("policy")}, {})
            save_checkpoint(self._folder, weights, keep=len(saved_steps(self._folder)) + 1)
            self.tidy()
        alarm = alarming(self.looks)
        if alarm and not known:
            self._progress.warn(f"{_alarm_words(self.looks)}. {self._remedy} may help")
        figures = {name: value for name, value in asdict(now).items() if name != "round" and value is not None}
        figures |= {"length_ratio": now.length / max(self.looks[0].length, 1e-9)}
        figures |= {"criterion": criterion(now), "alarm": float(alarm)}
        return {f"guard/{name}": value for name, value in figures.items()} | {"timing/guard": time.perf_counter() - started}

    def _see(self, round: int) -> Look:
        roles, config, demonstrations = self._roles, self._config, self._demonstrations
        tokens, each = config.ppo.micro_batch_tokens, config.guard.samples
        theirs, their_rewards = self._theirs
        rollout = self._sample(each)
        scored = {role: role_logprobs(roles, role, rollout, tokens) for role in sorted({self._numerator, "base", "sft", "policy"})}
        ours = Responses(rollout, each, scored)
        rewards, same = self._rewards(ours), ours.same_as(theirs)
        told = preference(their_rewards[:, 0], rewards, same)
        told = told[~np.isnan(told)]
        mask, policy = rollout.mask, scored["policy"].double()
        told_by_policy = role_logprobs(roles, "policy", demonstrations, tokens).double()
        nll, likely = -told_by_policy.sum(), masked_mean(told_by_policy.exp(), demonstrations.mask, 1)
        return Look(
            round=round,
            reward=float(rewards.mean()),
            auc=float(told.mean()) if len(told) else None,
            heldout_nll=float(nll / demonstrations.mask.sum()),
            heldout_nll_response=float(nll / len(demonstrations.mask)),
            match=float(same.mean()),
            kl=float(masked_sum(policy - scored["sft"], mask, 1).mean()),
            length=float(rollout.lengths.double().mean()),
            entropy=float(masked_mean(-policy, mask)),
            eos_rate=float(rollout.ended.double().mean()),
            heldout_probability=float(likely.mean()),
        )

    @cached_property
    def _theirs(self) -> tuple[Responses, Floats]:
        """The demonstrations and PPO's rewards of them, [P, 1]: the same at every look, as the models that say them are frozen.

        Not before the first look: freezing may round the SFT, and PPO's reward is the frozen one's.
        """
        demonstrations, tokens = self._demonstrations, self._config.ppo.micro_batch_tokens
        said = {role: role_logprobs(self._roles, role, demonstrations, tokens) for role in (self._numerator, "base")}
        theirs = Responses(demonstrations, 1, said)
        return theirs, self._rewards(theirs)

    @property
    def _numerator(self) -> str:
        """The role whose log-probability is the coherent reward's first term."""
        return "reward" if self._roles.has("reward") else "sft"

    def _rewards(self, responses: Responses) -> Floats:
        """[P, n] PPO's rewards of responses."""
        if self._preference_model is None:
            return responses.rewards(coherent_reward(self._config.reward), self._numerator)
        rollout = responses.rollout
        said = self._preference_model.scores(rollout, self._config.ppo.micro_batch_tokens)
        scores = preference_reward(self._config.reward)(said, torch.zeros(rollout.mask.shape), rollout.mask, rollout.ended).scores
        return scores.double().numpy().reshape(-1, responses.each)

    @property
    def _remedy(self) -> str:
        if self._preference_model is not None:
            return "A larger reward.kl_coef"
        return "A larger reward.kl_coef, an earlier share of sft.checkpoints_at as reward.checkpoint,"

    def _sample(self, each: int) -> Rollout:
        """The policy's responses at temperature 1. Every look draws from the same streams: common random numbers."""
        rows, seeds, index = repeated(self._demonstrations.prompt_ids, each, self._config.seed, "guard")
        sampling = Sampling(self._config.rollout.max_new_tokens)
        with self._progress.stage("Guard", len(index), "samples") as ticker, self._roles.use("policy") as model:
            return self._engine.generate(model, rows, seeds, sampling, index, lambda done, _: ticker.advance(done))

    # --- across a stop

    def state(self) -> dict[str, Any]:
        """What a PPO checkpoint holds of the guard; JSON."""
        return {"looks": [asdict(look) for look in self.looks]}

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Take up a `state`, or begin anew, and forget weights that a process stopped later has kept: their rounds are run again."""
        self.looks = [Look(**look) for look in saved["looks"]] if saved else []
        self.tidy()

    def tidy(self) -> None:
        """Delete kept weights but for those of the best look so far, now and as of each PPO checkpoint that a run may resume from."""
        if not world().main:
            return
        ends = [*saved_steps(self._run.path / "checkpoints" / "ppo"), math.inf]
        known = [[look for look in self.looks if look.round <= end] for end in ends]
        needed = {best_of(looks).round for looks in known if looks}
        for round in saved_steps(self._folder):
            if round not in needed:
                drop(checkpoint_path(self._folder, round))

    # --- the end

    def kept_round(self, last: int) -> int:
        return best_of(self.looks).round if self._config.guard.keep == "best" and not self._lost else last

    def conclude(self, last: int) -> None:
        """Put the kept weights into the role `policy` after round `last`, and say what was done."""
        kept, planned = self.kept_round(last), self._config.ppo.iterations
        if kept != last and not self._put_back(kept):
            kept = last
        what = "the policy of the last round is kept" if kept == last else f"the policy of round {kept} is kept"
        if last < planned:
            waited = looks_since_best(self.looks, self._warmup)
            self._progress.note(
                f"PPO stopped after round {last} of {planned}: {waited} looks at held-out demonstrations in a row were no better than "
                f"the one of round {best_of(self.looks).round} (guard.patience); {what}"
            )
        elif 0 < kept < last:
            self._progress.note(f"guard: the tokens of held-out demonstrations were most probable after round {kept} of {planned}; {what}")
        if kept == 0 and last > self._warmup:
            self._progress.warn(
                "PPO did not improve on the SFT: by the guard's measure (probability of held-out demonstrations) no round was better than "
                f"the SFT itself, so the SFT's weights are kept as the policy. {self._remedy} or a smaller ppo.learning_rate may help; "
                "guard.keep: last keeps the last round's policy all the same"
            )

    def _put_back(self, round: int) -> bool:
        """Put a look's weights into the role `policy`; where they are gone or damaged, say so and leave the last round's."""
        try:
            weights = load_checkpoint(self._folder, round, {"policy": self._roles.weights("policy")}).tensors.get("policy")
        except RunFolderError:
            weights = None
        if weights is None:
            self._lost = True
            self._progress.warn(
                f"guard: round {round} was the best, but its weights, {checkpoint_path(self._folder, round)}, are gone or damaged; "
                "the policy of the last round is kept"
            )
            return False
        self._roles.load_state("policy", weights)
        return True

    def outcome(self, last: int) -> dict[str, Any]:
        """For stages/ppo.json."""
        done = {"stopped_early": last < self._config.ppo.iterations, "kept_round": self.kept_round(last), "rounds": last}
        return done | ({"kept_lost": best_of(self.looks).round} if self._lost else {})


def _alarm_words(looks: Sequence[Look]) -> str:
    first, now = looks[0], looks[-1]
    auc = "" if first.auc is None else f", {first.auc:.2f} in round {first.round}"
    if now.auc is not None and first.auc is not None and first.auc - now.auc <= AUC_DROP:  # then it is below 1/2, and that is the sign
        auc += ": fewer than half" + (", as at the start" if first.auc < 0.5 else "")
    return (
        f"over-optimisation: from round {first.round} to {now.round} the reward rose from {first.reward:.2f} to {now.reward:.2f}, "
        f"while the tokens of held-out demonstrations became less probable (mean {criterion(first):.3f} to {criterion(now):.3f}), "
        f"and the reward prefers them to the policy's samples in a share of {now.auc:.2f} of pairs{auc}"
    )
