"""seeding.py: streams that depend on their purpose alone."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys

import pytest
import torch

from srppo.seeding import generator, permutation, row_uniforms, stream_seed


def test_streams_of_different_purposes_differ() -> None:
    purposes: list[tuple[int | str, ...]] = [
        (),
        ("rollout",),
        ("rollout", 1),
        ("rollout", "1"),
        ("rollout", 1, 1),
        ("rollout", 11),
        ("rollout", 1, 11),
        ("rollout", 11, 1),
        ("roll", "out"),
    ]
    seeds = [stream_seed(s, *p) for s in (0, 1, -1) for p in purposes]
    assert len(set(seeds)) == len(seeds)
    many = {stream_seed(0, "rollout", i, j) for i in range(100) for j in range(100)}
    assert len(many) == 10_000
    assert all(0 <= s < 2**63 for s in many)


def test_a_seed_is_the_same_in_every_process_and_release() -> None:
    digest = hashlib.blake2b(b"(3, 'rollout', 5)", digest_size=8).digest()
    expected = int.from_bytes(digest, "little") // 2
    assert stream_seed(3, "rollout", 5) == expected
    code = "from srppo.seeding import stream_seed; print(stream_seed(3, 'rollout', 5))"
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    assert int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout) == expected


def test_drawing_from_one_stream_moves_no_other() -> None:
    torch.manual_seed(0)
    global_state = torch.get_rng_state()
    first = torch.rand(4, generator=generator(0, "a"))
    torch.rand(1000, generator=generator(0, "b"))
    row_uniforms([1, 2], 50)
    permutation(50, 0, "c")
    assert torch.equal(torch.rand(4, generator=generator(0, "a")), first)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_permutation_holds_every_index_once(n: int) -> None:
    assert sorted(permutation(n, 0, "order")) == list(range(n))


def test_permutations_depend_on_seed_and_purpose() -> None:
    assert permutation(50, 0, "order") == permutation(50, 0, "order")
    assert len({tuple(permutation(50, s, p)) for s in (0, 1) for p in ("order", "split")}) == 4


def test_permutations_are_uniform() -> None:
    """Over 6000 seeds each of the 6 orders of 3 comes 1000 times, give or take 5 standard deviations of 29."""
    orders = [tuple(permutation(3, s)) for s in range(6000)]
    assert len(set(orders)) == 6
    assert all(abs(orders.count(o) - 1000) < 145 for o in set(orders))


def test_a_rows_uniforms_depend_on_neither_neighbours_nor_width() -> None:
    seeds = [stream_seed(0, "rollout", r) for r in range(5)]
    wide = row_uniforms(seeds, 40)
    assert wide.shape == (5, 40)
    assert wide.dtype == torch.float64
    assert torch.equal(row_uniforms(seeds[::-1], 40).flip(0), wide)
    assert torch.equal(row_uniforms([seeds[3]], 7)[0], wide[3, :7])
    assert torch.equal(row_uniforms([seeds[3]] * 2, 7)[1], wide[3, :7])


def test_row_uniforms_are_uniform() -> None:
    scipy = importlib.import_module("scipy.stats")
    drawn = row_uniforms([stream_seed(0, "u", r) for r in range(500)], 8)
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert scipy.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    assert scipy.kstest(drawn[:, 0].numpy(), "uniform").pvalue > 1e-3  # across streams, not only within one
    assert abs(torch.corrcoef(drawn[:, :2].T)[0, 1]) < 0.2
