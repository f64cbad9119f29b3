"""Random streams that depend on what they are for, never on what ran before: so a resumed run draws what the undisturbed one would."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def stream_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. stream_seed(0, "rollout", iteration, prompt_row, sample)."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(stream_seed(seed, *purpose))


def seed_dropout(seed: int, *purpose: int | str) -> None:
    """Seed torch's own stream, which an adapter's dropout draws from, for one purpose."""
    torch.manual_seed(stream_seed(seed, "dropout", *purpose))


def permutation(n: int, seed: int, *purpose: int | str) -> list[int]:
    """A seeded shuffle of range(n)."""
    return torch.randperm(n, generator=generator(seed, *purpose)).tolist()


def row_uniforms(seeds: list[int], columns: int) -> Tensor:
    """[B, columns] float64 uniforms in [0, 1), row b from its own stream: a row's draws do not depend on its neighbours."""
    return torch.stack([torch.rand(columns, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds])
