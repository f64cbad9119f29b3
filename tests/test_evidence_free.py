"""Ways to answer without training, and the paper's claims: choices by known rewards, verdicts on rows made for them."""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.evidence import claims, free

from srppo.config import build
from srppo.records import Rollout
from srppo.rollout.engine import Sampling


class Numbered:
    """An engine whose samples to a prompt are the tokens 0 to N - 1, in turn; greedy answers are the token 99."""

    def generate(self, model: Any, prompts: Any, seeds: Any, sampling: Sampling, index: Any = None, on_progress: Any = None) -> Rollout:
        tokens = torch.full((len(prompts), 1), 99) if sampling.greedy else (torch.arange(len(prompts)) % free.N)[:, None]
        seen = torch.ones(tokens.shape, dtype=torch.bool)
        return Rollout([list(p) for p in prompts], list(index), tokens, seen, torch.zeros(tokens.shape), torch.ones(len(prompts)).bool())


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A workspace in which token t earns log(t + 1) nats."""

    @contextmanager
    def use(role: str) -> Any:
        yield None

    def said(roles: Any, role: str, rollout: Rollout, rows: int) -> torch.Tensor:
        return torch.log(rollout.responses + 1.0) if role == "sft" else torch.zeros(rollout.responses.shape)

    monkeypatch.setattr(free, "role_logprobs", said)
    loaded = SimpleNamespace(roles=SimpleNamespace(use=use), evaluation_engine=Numbered())
    return SimpleNamespace(loaded=loaded, config=build({}))


def asked(count: int, greedy: bool = False) -> free.Asked:
    return free.Asked([[5]] * count, list(range(count)), Sampling(4, greedy=greedy), list(range(count)))


def test_the_best_is_the_one_with_the_highest_reward(space: Any) -> None:
    found = free.best_of(space, 0.0, None, asked(3))
    assert found.responses[:, 0].tolist() == [free.N - 1] * 3 and found.prompt_index == [0, 1, 2]
    assert free.best_of(space, 0.0, None, asked(3, greedy=True)).responses[:, 0].tolist() == [99] * 3


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_one_is_drawn_by_the_exponential_of_its_reward(space: Any, beta: float) -> None:
    """P(t) proportional to (t + 1)^(1 / beta); the mean of 4000 draws within four standard errors."""
    found = free.best_of(space, beta, None, asked(4000)).responses[:, 0].double().numpy()
    weights = np.arange(1, free.N + 1) ** (1 / beta)
    weights /= weights.sum()
    mean = float(weights @ np.arange(free.N))
    deviation = math.sqrt(float(weights @ (np.arange(free.N) - mean) ** 2))
    assert found.mean() == pytest.approx(mean, abs=4 * deviation / math.sqrt(4000))


def told(right: str, grows: float = 1.0) -> dict[str, Any]:
    """A row: right samples of two, the same prompts in both groups."""
    group = {"right": right, "greedy": "1" * len(right), "samples": 2, "length": 3.0, "ends": 1.0}
    return {"groups": {"with_demonstrations": group, "without_demonstrations": group}, "curves": {"length": [4.0, 4.0 * grows]}}


WORSE, BETTER = "0101" * 10, "1212" * 10
NAMES = {name for claim in claims.CLAIMS for name in claim.needed}


def table(better: set[str], grows: dict[str, float] | None = None) -> dict[str, str]:
    """Claim -> verdict, where the named rows are better than all others."""
    rows = {(n, s): told(BETTER if n in better else WORSE, (grows or {}).get(n, 0.9)) for n in NAMES for s in (1, 2, 3)}
    lines = [line.split(" | ") for line in claims.claims_table(rows) if line.startswith("| ")][1:]
    return {cells[0].removeprefix("| "): cells[-1].removesuffix(" |") for cells in lines}


def test_a_claim_holds_where_the_figures_say_so() -> None:
    up, down = table({n for n in NAMES if n.startswith("ppo/")}), table({n for n in NAMES if not n.startswith("ppo/")})
    for words in ("improves on SFT", "consistently outperforms SFT", "outperforms SFT of the same compute"):
        assert up[words] == "**holds**" and down[words].startswith("**does not hold**"), words
    assert table(set())["improves on SFT"] == "not clear"
    some = table({"ppo/eos", "ppo/16"})
    assert some["consistently outperforms SFT"] == "**holds only** for light, 16 demonstrations"
    assert some["particularly where demonstrations are scarce"] == "**holds**"
    assert table({"ppo/1024"})["particularly where demonstrations are scarce"] == "**does not hold**"


@pytest.mark.parametrize(
    ("token", "eos", "words"),
    [(1.5, 1.0, "**holds**"), (1.5, 1.8, "**does not hold**"), (0.9, 0.7, "does not arise: with neither do they grow")],
)
def test_a_length_bias_needs_growth(token: float, eos: float, words: str) -> None:
    found = table(set(), {"ppo/token": token, "ppo/eos": eos})
    assert found["the reward at EOS avoids the length bias of token rewards"] == words
