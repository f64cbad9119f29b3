"""Which demonstrations make up an optimizer step, and how they lie in memory.

Pure functions of (seed, epoch or step): a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from srppo.masking import example_batch, token_chunks
from srppo.records import Example, TokenBatch, pad_sequences
from srppo.seeding import permutation

WINDOW = 4  # consecutive batches of the shuffle whose examples are sorted by length together


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Optimizer steps that see each of n examples once: ceil(n / batch_size)."""
    return -(-n // batch_size)


def sft_batches(
    examples: Sequence[Example], *, batch_size: int, seed: int, epoch: int, batching: str = "length_grouped"
) -> list[list[int]]:
    """Indices of the examples of each optimizer step of an epoch. Every example comes once.

    The last batch is not a small one: sizes are spread evenly and differ by one at most, so that no step follows a single example.
    length_grouped: within each run of WINDOW batches of the epoch's shuffle, examples are sorted by length and cut into batches
    whose order is shuffled again; a batch holds like lengths, and still other examples in each epoch. packed: the plain shuffle.
    """
    steps = steps_per_epoch(len(examples), batch_size)
    order = permutation(len(examples), seed, "sft", epoch)
    return [batch for start in range(0, steps, WINDOW) for batch in _window(examples, order, start, steps, seed, epoch, batching)]


def step_batch(examples: Sequence[Example], *, step: int, batch_size: int, seed: int, batching: str = "length_grouped") -> list[Example]:
    """The examples of optimizer step 0, 1, 2 … counted over all epochs: sft_batches(epoch)[step of that epoch]."""
    steps = steps_per_epoch(len(examples), batch_size)
    epoch, position = divmod(step, steps)
    order = permutation(len(examples), seed, "sft", epoch)
    start = position - position % WINDOW
    return [examples[i] for i in _window(examples, order, start, steps, seed, epoch, batching)[position - start]]


def _window(examples: Sequence[Example], order: list[int], start: int, steps: int, seed: int, epoch: int, batching: str) -> list[list[int]]:
    """Batches start .. start + WINDOW of an epoch of so many steps."""
    cuts = [len(order) * k // steps for k in range(start, min(start + WINDOW, steps) + 1)]
    rows = order[cuts[0] : cuts[-1]]
    if batching == "length_grouped":
        rows.sort(key=lambda i: len(examples[i].ids))  # stable: equal lengths stay shuffled
    batches = [rows[a - cuts[0] : b - cuts[0]] for a, b in pairwise(cuts)]
    return [batches[k] for k in permutation(len(batches), seed, "sft window", epoch, start)]


def micro_batches(
    examples: Sequence[Example], micro_batch_tokens: int, batching: str, pad_id: int, max_tokens: int = 1024
) -> list[TokenBatch]:
    """One optimizer step's examples as batches of at most so many tokens; the sum of their targets is the step's denominator.

    length_grouped: rows of like length together, longest first. packed: several examples a row of up to max_tokens (a longer
    example has a row for itself).
    """
    if batching == "packed":
        rows = pack([len(e.ids) for e in examples], max_tokens)
        sizes = [sum(len(examples[i].ids) for i in row) for row in rows]
        return [packed_batch([[examples[i] for i in rows[r]] for r in chunk], pad_id) for chunk in token_chunks(sizes, micro_batch_tokens)]
    chunks = token_chunks([len(e.ids) for e in examples], micro_batch_tokens)
    return [example_batch([examples[i] for i in chunk], pad_id) for chunk in chunks]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices by row, first fit decreasing (Dósa 2007: at most 11/9 of the fewest possible rows, plus 6/9)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def packed_batch(rows: Sequence[Sequence[Example]], pad_id: int) -> TokenBatch:
    """Rows of several examples as one TokenBatch [B, L] with segment_ids. No example's first token is a target: the state
    before it belongs to its neighbour."""
    ids = pad_sequences([[t for e in row for t in e.ids] for row in rows], pad_id)
    attention = pad_sequences([[1] * sum(len(e.ids) for e in row) for row in rows])
    targets = pad_sequences([[m for e in row for m in (0, *e.target_mask[1:])] for row in rows]).bool()
    segments = pad_sequences([[n for n, e in enumerate(row, start=1) for _ in e.ids] for row in rows])
    return TokenBatch(ids, attention, targets, segments)
