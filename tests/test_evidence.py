"""The figures of the evidence pages: intervals against a closed form, pairing, what was lost, and digits that mean what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks.evidence import cases, figures, run

from srppo.evaluate import Answers


def test_the_interval_is_the_wider_of_the_bootstrap_and_students() -> None:
    """Bootstrap mean of S drawn seeds of n drawn prompts: variance (between + mean within / n) / S. Student's: 2.776 s / sqrt 5, by the
    tables. The first is wider where prompts are most of the chance, the second where seeds are."""
    rng = np.random.default_rng(1)
    for spread, prompts, wider in ((0.0, 10, "bootstrap"), (0.5, 200, "student")):
        parts = [rng.normal(0.0, 1.0, size=prompts) for _ in range(5)]
        parts = [x - x.mean() + spread * at for x, at in zip(parts, (0.0, 0.6, -0.8, 0.4, 1.2))]
        means = [x.mean() for x in parts]
        bootstrap = 2 * 1.96 * np.sqrt((np.var(means) + np.mean([x.var() for x in parts]) / prompts) / 5)
        student = 2 * 2.776 * np.std(means, ddof=1) / np.sqrt(5)
        assert (bootstrap > student) == (wider == "bootstrap")
        found = figures.estimate(parts)
        assert found.value == pytest.approx(np.mean(means))
        assert found.high - found.low == pytest.approx(max(bootstrap, student), rel=0.08)
        assert found.low < found.value < found.high


def row(seed: int, name: str, right: str, greedy: str) -> dict[str, Any]:
    told = {"right": right, "greedy": greedy, "samples": 2, "length": 3.0, "ends": 1.0}
    return {"name": name, "seed": seed, "groups": dict.fromkeys(figures.GROUPS, told)}


def test_gains_are_paired_and_losses_counted_from_what_the_base_knew() -> None:
    rows = {}
    for seed in (1, 2):
        for name, right, greedy in (("base", "0000", "1101"), ("sft/light", "0120", "1111"), ("ppo/eos", "1220", "0111")):
            rows[name, seed] = row(seed, name, right, greedy)
    rows["ppo/eos", 3] = row(3, "ppo/eos", "2222", "1111")  # a seed that the other lacks
    found = figures.gain(rows, "ppo/eos", "sft/light", "with_demonstrations")
    assert found.value == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)
    assert figures.each_gain(rows, "ppo/eos", "sft/light", "with_demonstrations") == [0.25, 0.25]
    assert figures.seeds_of(rows, "ppo/eos", "sft/light") == [1, 2]
    assert figures.lost(rows, "ppo/eos", "with_demonstrations").value == pytest.approx(1 / 3)  # the first of the base's three


def test_a_gain_that_every_prompt_shares_is_certain() -> None:
    """However much the prompts and the seeds differ: their differences do not."""
    rows = {}
    for seed, low, high in ((1, "0101", "1212"), (2, "1110", "2221"), (3, "0000", "1111")):
        rows["sft/light", seed], rows["ppo/eos", seed] = row(seed, "sft/light", low, "0000"), row(seed, "ppo/eos", high, "0000")
    found = figures.gain(rows, "ppo/eos", "sft/light", "with_demonstrations")
    assert found.low == found.value == found.high == 0.5


def test_answers_become_digits_in_the_order_of_their_rows() -> None:
    answers = [
        Answers("g", 5, "b", ["x", "y"], [1.0, 1.0], "x", 0.0, [1, 1]),
        Answers("other", 1, "c", ["x", "y"], [1.0, 1.0], "x", 1.0, [1, 1]),
        Answers("g", 2, "a", ["x", "y"], [0.0, 1.0], "x", 1.0, [1, 1]),
    ]
    told = run.answers_row(answers, {"mean_length": 2.0, "eos_rate": 1.0, "samples": 2}, "g")
    assert (told["right"], told["greedy"]) == ("12", "10")


def test_every_name_of_a_question_can_be_run() -> None:
    for name in {n for names in cases.QUESTIONS.values() for n in names} | set(cases.CHOICES):
        kind, _, rest = name.partition("/")
        tables: dict[str, dict[str, Any]] = {"sft": cases.SFTS, "ppo": cases.PPOS, "free": cases.FREE, "continued": cases.PPOS}
        assert name == "base" or rest in tables[kind], name
        if kind == "continued":
            assert cases.PPOS[rest].continued, name
        if kind in ("ppo", "continued"):
            assert cases.PPOS[rest].sft in cases.SFTS
