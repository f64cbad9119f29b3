"""What the reward card is made from: responses of base and SFT checkpoints, and what each of these models says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srppo.config import RunConfig
from srppo.data.as_rollout import as_rollout
from srppo.diagnose.statistics import Flags, Floats
from srppo.errors import MissingAnswer, ScorerFailed
from srppo.masking import masked_sum
from srppo.models.over_rollout import role_logprobs
from srppo.models.roles import Roles
from srppo.records import Example, Prompt, Rollout
from srppo.rewards import CoherentReward
from srppo.rollout.engine import RolloutEngine, Sampling, repeated
from srppo.rollout.extrapolation import generate_extrapolated
from srppo.rollout.record import position_limit
from srppo.rollout.torch_engine import TorchEngine
from srppo.scoring import Scorer
from srppo.seeding import permutation
from srppo.train.checkpoint import load_own
from srppo.world import world

CANDIDATE = "candidate"  # the role a checkpoint plays while it is looked at
OTHER = "reward"  # the name of a numerator that is no checkpoint of this run's SFT


@dataclass(frozen=True)
class Checkpoints:
    """SFT checkpoints by name, the one PPO starts from by default last: the role that holds one already, or the folder it lies in.

    `reward` (OTHER) is not among the names; it may be among the roles.
    """

    names: list[str]
    roles: dict[str, str]
    folders: dict[str, str]

    @contextmanager
    def role(self, roles: Roles, name: str, loaded_as: str = CANDIDATE) -> Iterator[str]:
        """The role that plays the checkpoint, loaded for the block where it is not in memory."""
        if name in self.roles:
            yield self.roles[name]
            return
        if name == OTHER:
            roles.load(loaded_as, self.folders[name])
        else:
            load_own(roles, loaded_as, self.folders[name])
        try:
            yield loaded_as
        finally:
            roles.drop(loaded_as)


@dataclass
class Responses:
    """Responses to P prompts, n a prompt (row p * n + i is prompt p's i-th), and what each model says of them."""

    rollout: Rollout  # B = P * n rows
    each: int  # n
    logprobs: dict[str, Tensor]  # model name -> [B, T] float32, zero off the mask

    @property
    def lengths(self) -> Floats:
        """[P, n] tokens, EOS included."""
        return self._table(self.rollout.lengths)

    @property
    def ended(self) -> Floats:
        """[P, n] 1 where the response has its EOS."""
        return self._table(self.rollout.ended)

    def rewards(self, reward: CoherentReward, numerator: str) -> Floats:
        """[P, n] coherent rewards, nats."""
        return self._table(reward(self.logprobs[numerator], self.logprobs["base"], self.rollout.mask, self.rollout.ended).scores)

    def log_ratio(self, numerator: str) -> Tensor:
        """[B, T] log pi_numerator - log pi_base, zero off the mask."""
        return torch.where(self.rollout.mask, self.logprobs[numerator] - self.logprobs["base"], 0.0)

    def loglikelihood(self, name: str) -> Floats:
        """[P, n] log-probability of the whole response, nats."""
        return self._table(masked_sum(self.logprobs[name], self.rollout.mask, 1))

    def of_prompts(self, which: Sequence[int]) -> Responses:
        """The responses to some of the prompts."""
        rows = [p * self.each + i for p in which for i in range(self.each)]
        r = self.rollout
        part = Rollout(
            [r.prompt_ids[b] for b in rows],
            [k for k in range(len(which)) for _ in range(self.each)],
            r.responses[rows],
            r.mask[rows],
            r.behaviour_logprobs[rows],
            r.ended[rows],
        )
        return Responses(part, self.each, {name: lp[rows] for name, lp in self.logprobs.items()})

    def same_as(self, demonstrations: Responses) -> Flags:
        """[P, n] whether the response is the prompt's demonstration, token for token."""
        assert len(demonstrations.rollout.prompt_ids) * self.each == len(self.rollout.prompt_ids), "not the same prompts"
        wanted = [demonstrations.rollout.response_ids(p) for p in range(len(demonstrations.rollout.prompt_ids))]
        equal = [self.rollout.response_ids(b) == wanted[b // self.each] for b in range(len(self.rollout.prompt_ids))]
        return np.asarray(equal, dtype=bool).reshape(-1, self.each)

    def _table(self, x: Tensor) -> Floats:
        return x.double().numpy().reshape(-1, self.each)


@dataclass(frozen=True)
class Gatherer:
    """Samples and scores, with everything that needs."""

    roles: Roles
    engine: RolloutEngine
    extrapolator: TorchEngine | None
    config: RunConfig
    check: Callable[[], None]  # raises where the user wants to stop
    poll: Callable[[int, int], None]  # the same in the middle of decoding, with rows done and rows in all

    def demonstrations(self, examples: Sequence[Example]) -> Responses:
        """Held-out demonstrations as responses, one a prompt (see chosen_demonstrations)."""
        limit = self.config.diagnose.heldout
        return Responses(chosen_demonstrations(examples, self.roles, self.config, limit, "diagnose"), 1, {})

    def sample(self, role: str, author: str, prompts: Sequence[list[int]], each: int, purpose: str) -> Responses:
        """`each` responses at temperature 1 to each prompt. The random streams depend on author, purpose, prompt and sample."""
        rows, seeds, index = self._rows(author, prompts, each, purpose)
        with self.roles.use(role) as model:
            rollout = self.engine.generate(model, rows, seeds, self._sampling, index, self.poll)
        return Responses(rollout, each, {})

    def sample_extrapolated(
        self, start: str, numerator: str, beta: float, prompts: Sequence[list[int]], each: int, purpose: str
    ) -> Responses:
        """The same by logit extrapolation, two or three models token by token."""
        assert self.extrapolator is not None
        rows, seeds, index = self._rows("sft", prompts, each, purpose)
        rollout = generate_extrapolated(
            self.roles,
            rows,
            seeds,
            self._sampling,
            beta=beta,
            engine=self.extrapolator,
            start=start,
            numerator=numerator,
            prompt_index=index,
            on_progress=self.poll,
        )
        return Responses(rollout, each, {})

    def _rows(self, author: str, prompts: Sequence[list[int]], each: int, purpose: str) -> tuple[list[list[int]], list[int], list[int]]:
        return repeated(prompts, each, self.config.seed, "diagnose", purpose, author)

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.config.rollout.max_new_tokens)

    def score(self, role: str, name: str, responses: Sequence[Responses]) -> None:
        """Let a role say its log-probabilities of all responses, noted under `name`."""
        for some in responses:
            self.check()
            some.logprobs[name] = role_logprobs(self.roles, role, some.rollout, self.config.ppo.micro_batch_tokens)


def chosen_demonstrations(examples: Sequence[Example], roles: Roles, config: RunConfig, limit: int, purpose: str) -> Rollout:
    """At most `limit` of the demonstrations, drawn by the seed: those with a prompt that leaves room for a response."""
    eos = roles.special.eos_ids
    whole = as_rollout(examples, eos)
    with roles.use("base") as model:
        positions = position_limit(model.config)
    room = math.inf if positions is None else positions - config.rollout.max_new_tokens
    fit = [i for i, prompt in zip(whole.prompt_index, whole.prompt_ids) if len(prompt) <= room]
    chosen = sorted(permutation(len(fit), config.seed, purpose)[:limit])
    return as_rollout([examples[fit[k]] for k in chosen], eos)


def spread_prompts(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """Up to `limit` prompts, groups in turn, in the order they have (which the seed has drawn)."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, []).append(prompt)
    turns = [p for turn in range(max(map(len, groups.values()), default=0)) for g in groups.values() for p in g[turn : turn + 1]]
    return turns[:limit]


def forgiving(scorer: Scorer | None, warn: Callable[[str], None]) -> Scorer | None:
    """The scorer as the card asks it: PPO's prompts often lack what a user's function reads, so where it raises that is told once,
    and counts as a row without an answer. What it must not return stays an error."""
    if scorer is None:
        return None
    told = False

    def score(completion: str, row: dict[str, Any]) -> float:
        nonlocal told
        try:
            return scorer(completion, row)
        except ScorerFailed as error:
            if not told:
                warn(f"{error}. The reward card does without scores on such prompts")
            told = True
            raise MissingAnswer(str(error)) from error

    return score


def scores_of(scorer: Scorer | None, prompts: Sequence[Prompt], responses: Responses, decode: Callable[[list[int]], str]) -> Floats | None:
    """[P, n] the user's scores of the responses; None without a scorer, or where the prompts' rows lack what it needs."""
    if scorer is None or not prompts:
        return None
    texts = [decode(responses.rollout.response_ids(b)) for b in range(len(responses.rollout.prompt_ids))]
    try:
        scores = world().once(lambda: [scorer(text, prompts[b // responses.each].fields) for b, text in enumerate(texts)])
    except MissingAnswer:  # as PPO's prompts usually do
        return None
    return np.asarray(scores, dtype=np.float64).reshape(-1, responses.each)
