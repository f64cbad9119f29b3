"""A model's word on every response token of a rollout, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from srppo.masking import rollout_batch, token_chunks, unflatten
from srppo.memory_limit import limits
from srppo.models.roles import Roles
from srppo.records import Prefix, Rollout, TokenBatch
from srppo.world import deal, world

KEY = "ppo.micro_batch_tokens"


def rollout_tokens(rollout: Rollout) -> int:
    """Prompt and response tokens of all rows: what one pass over the rollout costs."""
    return sum(len(p) for p in rollout.prompt_ids) + int(rollout.mask.sum())


def longest(rollout: Rollout) -> int:
    """Prompt and response tokens of the longest row."""
    return max((len(p) + n for p, n in zip(rollout.prompt_ids, rollout.lengths.tolist())), default=1)


def padding_tokens(roles: Roles, rollout: Rollout, tokens: int, rows: list[int] | None = None) -> int:
    """Positions without a token in the micro-batches that a pass over some rows (all by default) goes through; 0 with flat rows."""
    if roles.flat:
        return 0
    lengths = [len(p) + n for p, n in zip(rollout.prompt_ids, rollout.lengths.tolist())]
    taken = [lengths[r] for r in rows] if rows is not None else lengths
    return sum(taken[chunk[0]] * len(chunk) - sum(taken[i] for i in chunk) for chunk in token_chunks(taken, tokens))


def micro_batches(
    roles: Roles, rollout: Rollout, tokens: int, rows: list[int] | None = None, prefixes: list[Tensor] | None = None
) -> list[tuple[list[int], TokenBatch]]:
    """Rows of a rollout (all by default) by like length, with their batches, each of at most so many tokens or of one row."""
    rows = list(range(len(rollout.prompt_ids))) if rows is None else rows
    responses = rollout.lengths.tolist()
    chunks = token_chunks([len(rollout.prompt_ids[r]) + responses[r] for r in rows], tokens)
    parts = [[rows[i] for i in chunk] for chunk in chunks]
    batches = [rollout_batch(rollout, part, roles.special.pad_id) for part in parts]
    if prefixes is not None:
        known = [Prefix(torch.cat([prefixes[r] for r in part]), roles.prefix_depth) for part in parts]
        batches = [replace(batch, prefix=prefix) for batch, prefix in zip(batches, known)]
    return [(part, batch.to(roles.device)) for part, batch in zip(parts, batches)]


def shares(rollout: Rollout) -> list[list[int]]:
    """Which rows each process works on when a model runs over the rollout: nearly the same number of tokens each."""
    lengths = [len(p) + n for p, n in zip(rollout.prompt_ids, rollout.lengths.tolist())]
    return deal(lengths, world().size)


def own_batches(roles: Roles, rollout: Rollout, tokens: int, prefixes: list[Tensor] | None = None) -> list[tuple[list[int], TokenBatch]]:
    """The micro-batches of this process's share. Where the weights are spread, as many as the others have: the last ones are of no row,
    and what a model says of their batch is for nobody."""
    batches = micro_batches(roles, rollout, tokens, shares(rollout)[world().rank], prefixes)
    if roles.spread and rollout.prompt_ids:
        missing = world().most(len(batches)) - len(batches)
        batches += [([], batch) for _, batch in micro_batches(roles, rollout, tokens, [0]) * missing]
    return batches


def prefixes(roles: Roles, rollout: Rollout, tokens: int) -> list[Tensor] | None:
    """B of [P_b + T_b - 1, H] on the device: what the layers below the first adapter say of each row but its last token, which predicts
    nothing. None where the first layer has an adapter."""
    if not roles.prefix_depth:
        return None
    out = [torch.empty(0)] * len(rollout.prompt_ids)
    lengths = rollout.lengths.tolist()

    def run(size: int) -> None:
        for rows, batch in micro_batches(roles, rollout, size):
            states = roles.prefix_states(batch)
            for row, own in zip(rows, states.split([len(rollout.prompt_ids[r]) + lengths[r] - 1 for r in rows])):
                out[row] = own.clone()

    limits.within(KEY, tokens, longest(rollout), run)
    return out


def over_rollout(
    roles: Roles, rollout: Rollout, tokens: int, word: Callable[[TokenBatch], Tensor], prefixes: list[Tensor] | None = None
) -> Tensor:
    """[B, T] float32 on the CPU, zero off the mask, of a function TokenBatch -> [N] (one value a target token).

    tokens: in memory at once, those of one row at least. prefixes: of the rows, where known. No gradient is kept.
    Each process works on its share of the rows, and all get all.
    """
    out = torch.zeros(rollout.mask.shape)

    def run(size: int) -> None:
        for rows, batch in own_batches(roles, rollout, size, prefixes):
            said = word(batch)
            if rows:
                out[rows] = unflatten(said.detach().float().cpu(), rollout.mask[rows])

    limits.within(KEY, tokens, longest(rollout), run)
    return world().sum_(out)


def role_logprobs(roles: Roles, role: str, rollout: Rollout, tokens: int, prefixes: list[Tensor] | None = None) -> Tensor:
    """[B, T] log-probability of each response token under a role."""
    with roles.use(role):  # once for all micro-batches: an offloaded model visits the device once
        return over_rollout(roles, rollout, tokens, lambda batch: roles.score(role, batch).logprobs, prefixes)


def logprobs_and_states(
    roles: Roles, role: str, rollout: Rollout, tokens: int, prefixes: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """role_logprobs, and from the same pass B of [T_b, H]: the states that predict each row's response tokens, on the role's device.

    Of several processes each has the states of its share (`shares`); those of the other rows are empty.
    """
    out, states = torch.zeros(rollout.mask.shape), [torch.empty(0)] * len(rollout.prompt_ids)
    lengths = rollout.lengths

    def run(size: int) -> None:
        for rows, batch in own_batches(roles, rollout, size, prefixes):
            scores = roles.score(role, batch, states=True)
            assert scores.states is not None
            if not rows:
                continue
            out[rows] = unflatten(scores.logprobs.float().cpu(), rollout.mask[rows])
            for row, own in zip(rows, scores.states.split(lengths[rows].tolist())):
                states[row] = own.clone()  # not a view that keeps the whole micro-batch

    with roles.use(role):
        limits.within(KEY, tokens, longest(rollout), run)
    return world().sum_(out), states
