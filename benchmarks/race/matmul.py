"""How fast this machine multiplies matrices, measured now: python -m benchmarks.race.matmul JOB.json RESULT.json

Operations a second on one thread in float32: of a large square product (the peak), and of a model's own products at the number of
rows that decoding and training give them. The best of many repetitions, so that a busy neighbour counts as little as may be.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from benchmarks.race.floor import Flops
from benchmarks.race.job import Job
from benchmarks.race.shapes import Shape

SQUARE = (512, 1024, 2048)
SECONDS = 0.25  # of repetitions a product
HEAD_ROWS = 1024
SHORTEST = 1e8  # operations timed at once, at least


def best_rate(
    multiply: Callable[[], object],
    operations: float,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.process_time,
    sync: Callable[[], None] = lambda: None,
) -> float:
    """Operations a second of the fastest repetition; the first two are not counted.

    clock: processor seconds on a CPU, so that what other processes took does not count. Small products are timed many at once.
    """
    times = max(1, round(SHORTEST / operations))
    best, spent, done = float("inf"), 0.0, -2
    while spent < seconds or done < 3:
        sync()
        start = clock()
        for _ in range(times):
            multiply()
        sync()
        took = max(clock() - start, 1e-9)
        done += 1
        if done > 0:
            best, spent = min(best, took), spent + took
    return times * operations / best


def linear_rate(rows: int, inner: int, outer: int) -> float:
    """Of x W^T, as a linear layer computes it."""
    x, weight = torch.randn(rows, inner), torch.randn(outer, inner)
    return best_rate(lambda: torch.nn.functional.linear(x, weight), 2.0 * rows * inner * outer)


def backward_rate(rows: int, inner: int, outer: int, full: bool) -> float:
    """Of a linear layer's gradients: to its input and, in full tuning, to its weight."""
    x, weight, grad = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
    to_input = best_rate(lambda: grad @ weight, 2.0 * rows * inner * outer)
    if not full:
        return to_input
    to_weight = best_rate(lambda: grad.T @ x, 2.0 * rows * inner * outer)
    return 2 / (1 / to_input + 1 / to_weight)


def together(parts: Iterable[tuple[float, float]]) -> float:
    """The rate of several products in a row: (operations, rate) of each."""
    parts = list(parts)
    return sum(work for work, _ in parts) / sum(work / rate for work, rate in parts)


def shape_rates(shape: Shape, full: bool) -> Flops:
    """The rate of each kind of product of floor.Flops; attention counts at the blocks' rate."""
    model, rows = shape.model, shape.batch // shape.minibatches
    tokens, head_rows = rows * (shape.prompt // 2 + shape.response), min(HEAD_ROWS, rows * shape.response)
    linears = [(a, b, 2.0 * a * b) for _, a, b in model.linears()]

    def blocks(rate: Callable[[int, int], float]) -> float:
        known = {(a, b): rate(a, b) for a, b, _ in linears}
        return together((work, known[a, b]) for a, b, work in linears)

    return Flops(
        decode=blocks(lambda a, b: linear_rate(shape.batch, a, b)),
        decode_head=linear_rate(shape.batch, model.hidden, model.vocab),
        forward=blocks(lambda a, b: linear_rate(tokens, a, b)),
        forward_head=linear_rate(head_rows, model.hidden, model.vocab),
        backward=blocks(lambda a, b: backward_rate(tokens, a, b, full)),
        backward_head=backward_rate(head_rows, model.hidden, model.vocab, full),
    )


def peak_rate() -> float:
    """Of the best large square product."""
    best = 0.0
    for n in SQUARE:
        a, b = torch.randn(n, n), torch.randn(n, n)
        best = max(best, best_rate(lambda a=a, b=b: a @ b, 2.0 * n**3, 2 * SECONDS))
    return best


def main() -> None:
    job = Job.load(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rates = {"peak": peak_rate(), "kinds": list(shape_rates(job.shape, job.tuning == "full").parts())}
    Path(sys.argv[2]).write_text(json.dumps(rates))


if __name__ == "__main__":
    main()
