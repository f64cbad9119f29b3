"""The records that travel between stages. Each stage returns a new one and edits none.

Shape legend of the whole project:
    B rows (sequences, rollouts)   P prompt tokens   T response tokens (columns of the longest response)
    L = prompt + response tokens   N target tokens of a batch, in row-major order   H hidden size   V vocabulary
Padding is always at the right (only the rollout engine pads prompts at the left, inside itself).
Log-probabilities are natural logarithms (nats), float32, untempered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A tokenised demonstration."""

    ids: list[int]  # prompt and response, EOS included
    target_mask: list[int]  # same length; 1 where the token is learned (response, or assistant turns), 0 elsewhere
    row: int  # 0-based row in its source
    group: str = "all"


@dataclass(frozen=True)
class Prompt:
    """A rendered and tokenised prompt without its answer."""

    ids: list[int]
    text: str  # the prompt as rendered, for people to read
    row: int  # 0-based row in its source
    group: str = "all"
    fields: dict[str, Any] = field(default_factory=dict)  # the source row, for scoring functions
    messages: list[dict[str, Any]] | None = None  # the conversation as rendered, system message included; None: a plain text


@dataclass(frozen=True)
class Prefix:
    """States of a batch's flat row (models.flat) that enter the decoder layer number `depth`, the first that differs between roles."""

    states: Tensor  # [tokens, H]
    depth: int


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded sequences and which of their tokens count.

    A row may hold several examples one after the other (packing). Then segment_ids numbers them, and the model must be
    called with position_ids = batch.position_ids, attention_mask=None and use_cache=False: transformers reads the
    restarts in the positions as borders no attention crosses, in causal and sliding-window layers alike.
    """

    ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64, 1 on real tokens
    target_mask: Tensor  # [B, L] bool, True at the N tokens whose log-probability counts; column 0 is never True
    segment_ids: Tensor | None = None  # [B, L] int64, 1, 2 ... for the examples packed in a row, 0 on padding; None: one a row
    prefix: Prefix | None = None  # what the layers below the adapters say of it, where that is known already

    @property
    def targets(self) -> int:
        """N, the number of target tokens."""
        return int(self.target_mask.sum())

    @property
    def position_ids(self) -> Tensor | None:
        """[B, L] int64 positions that restart at 0 with each packed example (and with the padding); None where nothing is packed."""
        if self.segment_ids is None:
            return None
        columns = torch.arange(self.segment_ids.shape[1], device=self.segment_ids.device).expand_as(self.segment_ids)
        starts = torch.ones_like(self.segment_ids, dtype=torch.bool)
        starts[:, 1:] = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        return columns - torch.where(starts, columns, torch.zeros_like(columns)).cummax(1).values

    def to(self, device: torch.device | str) -> TokenBatch:
        segments = None if self.segment_ids is None else self.segment_ids.to(device)
        prefix = None if self.prefix is None else Prefix(self.prefix.states.to(device), self.prefix.depth)
        return TokenBatch(self.ids.to(device), self.attention_mask.to(device), self.target_mask.to(device), segments, prefix)


@dataclass(frozen=True)
class TokenScores:
    """What a model says of the N target tokens of a TokenBatch."""

    logprobs: Tensor  # [N] float32
    entropy: Tensor | None = None  # [N] float32, nats, of the distribution each target token was drawn from
    states: Tensor | None = None  # [N, H] the states that predicted them, where asked for


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. Row b answers prompt prompt_index[b] of the list given to the engine."""

    prompt_ids: list[list[int]]  # B lists of prompt tokens
    prompt_index: list[int]  # B
    responses: Tensor  # [B, T] int64, padding 0 where mask is False
    mask: Tensor  # [B, T] bool, True on response tokens incl. EOS
    behaviour_logprobs: Tensor  # [B, T] float32, log mu of each sampled token, 0 off the mask
    ended: Tensor  # [B] bool, True where an EOS was sampled before the length limit

    @property
    def lengths(self) -> Tensor:
        """[B] int64 response lengths, EOS included."""
        return self.mask.sum(1)

    def response_ids(self, row: int) -> list[int]:
        return self.responses[row][self.mask[row]].tolist()


@dataclass(frozen=True)
class Features:
    """What a fitted critic reads before each response token: the frozen model's state, and the reward's terms so far.

    A coherent reward at the response's end is a sum of which that part is already decided; no state says it as plainly.
    """

    states: list[Tensor]  # B of [T_b, H], as the model gave them
    so_far: list[Tensor]  # B of [T_b] float32, nats

    def parts(self, rows: Sequence[int], tokens: int = 4096) -> Iterator[tuple[list[int], Tensor]]:
        """Runs of these rows, each of about so many tokens, with their features [n, H + 1] float32."""
        part: list[int] = []
        for place, row in enumerate(rows):
            part.append(row)
            if place + 1 == len(rows) or sum(len(self.so_far[r]) for r in part) >= tokens:
                states, so_far = (torch.cat([x[r] for r in part]).float() for x in (self.states, self.so_far))
                yield part, torch.cat([states, so_far[:, None].to(states.device)], 1)
                part = []


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the frozen models' and the critic's word on each response token."""

    rollout: Rollout
    lp_reward: Tensor  # [B, T] log pi of the reward's numerator (the SFT checkpoint)
    lp_base: Tensor  # [B, T] log pi of the reward's denominator
    lp_sft: Tensor  # [B, T] log pi of the SFT model, the policy's start (often the numerator and the anchor too)
    lp_anchor: Tensor | None  # [B, T] log pi of the KL anchor; None without one
    values: Tensor  # [B, T] critic's value of the state before each response token, in the critic's units
    preference: Tensor | None = None  # [B] a reward model's score of each response; None with the coherent reward
    features: Features | None = None  # what a critic without a trunk reads; None where it has one
    prefixes: list[Tensor] | None = None  # B of [P_b + T_b - 1, H], states that enter the first adapted layer; None where all are adapted


@dataclass(frozen=True)
class Experience:
    """What the PPO update consumes."""

    rollout: Rollout
    old_logprobs: Tensor  # [B, T] log mu
    old_values: Tensor  # [B, T] in the critic's units
    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T] the critic's targets, in its units
    keep: Tensor  # [B] bool, False for rollouts left out of the loss (missing-EOS treatment "exclude")
    features: Features | None = None  # as in ScoredRollout
    prefixes: list[Tensor] | None = None  # as in ScoredRollout


@dataclass(frozen=True)
class LossOutput:
    """A loss as a SUM over tokens, with metric sums under the same denominator. The step divides once, by the global token count."""

    loss: Tensor  # scalar, differentiable
    metrics: dict[str, Tensor]  # scalars, detached sums over the same tokens


def pad_sequences(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Right-pad B lists of ints into an int64 tensor [B, max length]."""
    width = max((len(r) for r in rows), default=0)
    return torch.tensor([list(r) + [value] * (width - len(r)) for r in rows], dtype=torch.int64).reshape(len(rows), width)
