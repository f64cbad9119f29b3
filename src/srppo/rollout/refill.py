"""Decoding many prompts through a fixed number of slots: a row that ends makes room for the next prompt while the others go on.

A step of 128 rows costs a CPU little more than one of 32, and a GPU nothing more, so the batch is kept wide.
B rows in all, S slots, R of them in use, T response limit, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from srppo.rollout.decode import LEAVING_SHARE, Step, checks_every, read
from srppo.rollout.engine import Sampling
from srppo.rollout.replay import Replay, bucket
from srppo.rollout.sampling import draw
from srppo.rollout.slots import Places, insert, move, slot_cache
from srppo.rollout.stats import DecodeStats

REFILL_SHARE = 8  # new prompts are read once one slot in so many is free: a pass over few tokens costs as much as a step


class Lanes:
    """The state of the rows that are being decoded, in tensors whose addresses stay, and the step that advances them.

    uniforms [B, T] float64 on the model's device, unused when greedy.
    """

    def __init__(self, model: Step, uniforms: Tensor, eos_ids: Sequence[int], sampling: Sampling, places: Places, fixed: bool):
        device, rows, slots = model.device, len(uniforms), len(places.numbers)
        self.model, self.uniforms, self.sampling, self.places = model, uniforms, sampling, places
        self.cache = slot_cache(model.new_cache(), places, fixed)
        self.eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
        # column T takes what rows that have reached the limit still say until it is noticed
        self.tokens = torch.zeros(rows, sampling.max_new_tokens + 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, sampling.max_new_tokens + 1, dtype=torch.float32, device=device)
        self.row, self.drawn, self.token = (torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(3))  # [S]
        self.ended = torch.zeros(slots, dtype=torch.bool, device=device)
        self.all_columns = torch.arange(places.capacity, device=device)

    def advance(self) -> None:
        """One more token for the R slots in use. Its shapes depend on places.rows and places.seen alone; it never waits for the device."""
        places = self.places
        now = slice(places.rows)
        columns = places.columns[now]
        columns.clamp_(max=places.seen - 1)  # only of rows that have ended
        attention = (self.all_columns[: places.seen] <= columns[:, None]).long()
        logits = self.model(self.token[now, None], attention, columns[:, None], self.cache)
        token, ended = self._record(logits, self.row[now], self.drawn[now])
        self.token[now] = token
        self.ended[now] |= ended
        self.drawn[now] += 1
        columns += 1

    def start(self, logits: Tensor, rows: Tensor, slots: Tensor, lengths: Sequence[int]) -> None:
        """Rows (numbers [N]) take slots (numbers [N]), with the logits [N, V] that follow their prompts; the cache has the prompts."""
        nothing = torch.zeros_like(rows)
        token, ended = self._record(logits, rows, nothing)
        self.row[slots], self.token[slots], self.ended[slots], self.drawn[slots] = rows, token, ended, nothing + 1
        self.places.columns[slots] = torch.tensor(list(lengths), device=slots.device)

    def move(self, source: list[int], target: list[int], columns: int) -> None:
        """The rows of some slots go to others, at most so many columns of each."""
        a, b = (torch.tensor(x, device=self.row.device) for x in (source, target))
        for state in (self.row, self.drawn, self.token, self.ended, self.places.columns):
            state[b] = state[a]
        move(self.cache, a, b, columns)

    def _record(self, logits: Tensor, rows: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Draw and write down a token for each row, of which so many were drawn before; the tokens, and whether the rows end with them."""
        limit = self.sampling.max_new_tokens
        token, logprob = draw(logits, self.uniforms[rows, drawn.clamp(max=limit - 1)], self.sampling)
        place = drawn.clamp(max=limit)
        self.tokens[rows, place], self.logprobs[rows, place] = token, logprob
        return token, (token[:, None] == self.eos).any(1) | (drawn + 1 >= limit)


def decode_refilled(
    model: Step,
    prompts: Sequence[tuple[int, ...]],
    uniforms: Tensor,
    eos_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    on_ended: Callable[[int], None],
    stats: DecodeStats,
    static: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample a response to each of B prompts, equal ones side by side, at most batch_size at once. For caches that slots.fits.

    uniforms: [B, T] float64 on the model's device, unused when greedy. on_ended(n): n more rows have ended,
    which may be 0.
    static: few different shapes of a step, and on a CUDA device each of them replayed as a graph (replay.py).
    Returns tokens [B, T] int64 and their untempered log-probabilities [B, T] float32; what follows a row's first EOS is without meaning.
    """
    count, limit, device = len(prompts), sampling.max_new_tokens, model.device
    slots = min(batch_size, count)
    numbers = torch.arange(slots, device=device)
    places = Places(torch.zeros_like(numbers), numbers, slots, 0, max(map(len, prompts)) + limit)
    lanes = Lanes(model, uniforms, eos_ids, sampling, places, fixed=static)
    advance = Replay(lanes.advance, places, device) if static else lanes.advance
    offsets: dict[int, int] = {}  # for each slot whose row goes on: its next column, less the steps made
    waiting, steps, every = 0, 0, checks_every(device)  # waiting: number of the next prompt

    while True:
        if steps % every == 0 and offsets:
            flags = lanes.ended.tolist()
            gone = [s for s in offsets if flags[s]]
            for slot in gone:
                del offsets[slot]
            on_ended(len(gone))
        free = [s for s in range(places.rows) if s not in offsets]
        if waiting < count and (len(free) * REFILL_SHARE >= slots or len(free) >= count - waiting):
            for part in read(model, prompts[waiting : waiting + len(free)], stats):
                rows = range(waiting, waiting + len(part.rows))
                taken, lengths = free[: len(rows)], [len(prompts[r]) for r in rows]
                to = torch.tensor(taken, device=device)
                insert(lanes.cache, part.cache, part.rows, lengths, to)
                lanes.start(part.logits, torch.tensor(rows, device=device), to, lengths)
                offsets |= {s: n - steps for s, n in zip(taken, lengths)}
                free, waiting = free[len(rows) :], rows.stop
            continue  # some may have ended at once
        if not offsets:
            break
        if waiting == count and len(free) * LEAVING_SHARE >= places.rows:
            close_up(lanes, offsets, steps, halves=static)
        places.seen = min(max(offsets.values()) + steps + 1, places.capacity)  # rows that have ended, unnoticed, may stand beyond
        if static:
            places.seen = bucket(places.seen, places.capacity)
        advance()
        stats.row_steps += places.rows
        steps += 1
    return lanes.tokens[:, :limit], lanes.logprobs[:, :limit]


def close_up(lanes: Lanes, offsets: dict[int, int], steps: int, halves: bool) -> None:
    """Move the last rows into slots that are free, so that the slots in use are the first ones and fewer.

    halves: only to a half, a quarter ... of the slots, as each number of rows is a graph of its own.
    """
    places = lanes.places
    rows = places.rows if halves else len(offsets)
    while halves and rows // 2 >= len(offsets):
        rows //= 2
    source = [s for s in offsets if s >= rows]
    if source:
        target = [s for s in range(rows) if s not in offsets][: len(source)]
        lanes.move(source, target, max(offsets.values()) + steps)
        offsets |= {b: offsets.pop(a) for a, b in zip(source, target)}
    places.rows = rows
