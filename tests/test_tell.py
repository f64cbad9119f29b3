"""The reward card in the terminal: what it says, in lines that fit."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from srppo.diagnose.tell import tell
from srppo.progress import PlainProgress
from srppo.report.card_words import checkpoint, nats, points
from tiny_card import bare_card, full_card, hostile_card, told


def test_terminal_says_what_the_card_says() -> None:
    text = told(full_card())
    flat = " ".join(text.split())
    assert "warning: Reward card: CAUTION. PPO may help: read the reasons first." in flat
    assert "- The reward prefers longer answers" in flat
    assert (
        "PPO will start from the SFT checkpoint at 50 % of its training (the card's choice), be rewarded by the log-ratio of "
        "the SFT model to the base (set in the recipe), and use β 1.5 (the card's choice)"
    ) in flat
    assert "held-out demonstrations +0.28 nats a response likelier (95 % interval 0.13 to 0.42)." in flat
    assert "83 % ±6" in flat and "+0.28 ±0.15" in flat and "▸1.5" in flat and "▸SFT at 50 %" in flat
    assert "The reward rises with the response's length (rank correlation +0.41" in flat
    assert "22 % sits in the token that ends the response (EOS) and 58 %" in flat
    for title in ("prefer demonstrations?", "What each β", "own answers", "Which SFT checkpoints?", "Where PPO is heading"):
        assert title in flat, title


def test_lines_fit_100_columns_and_tell_every_group() -> None:
    class Narrow(PlainProgress):
        def table(self, title: str, columns: Any, rows: Any) -> None:
            from rich.console import Console

            from srppo import progress

            progress._print_table(Console(file=stream, width=100, no_color=True), title, columns, rows)

    groups = tuple(f"reasoning_task_{i}" for i in range(10))
    stream = io.StringIO()
    tell(full_card(groups), Narrow(stream, lambda: 0.0))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 150
    assert "What β 1.5 would do, by group of PPO prompts" in stream.getvalue()
    assert all(f"reasoning task {i}" in stream.getvalue() for i in range(10))
    assert "8 more groups are in diagnose.json" in " ".join(stream.getvalue().split())


def test_verdict_is_a_note_or_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(hostile_card("x")).startswith("Reward card: GO. ")
    told(bare_card(), "quiet")
    assert "NO-GO" in capsys.readouterr().err


def test_json_lines_are_json() -> None:
    events = [json.loads(line) for line in told(full_card(), "json").splitlines()]
    assert {e["event"] for e in events} == {"warn", "note", "table"}


def test_card_that_lacks_most_is_told() -> None:
    text = told(bare_card())
    assert "nothing to look at" in text and "Predicted" not in text and "None" not in text and "nan" not in text
    assert "Which SFT checkpoints?" not in text and "Where PPO" not in text


@pytest.mark.parametrize(
    ("value", "sign", "expected"),
    [
        (1.234, False, "1.23"),
        (-0.5, True, "−0.50"),
        (1234.6, True, "+1235"),
        (None, False, "–"),
        (float("nan"), False, "–"),
        (True, False, "–"),
    ],
)
def test_numbers(value: Any, sign: bool, expected: str) -> None:
    assert nats(value, sign) == expected


def test_checkpoints_and_points() -> None:
    assert checkpoint("share-0.25") == "the SFT checkpoint at 25 % of its training"
    assert [checkpoint(n) for n in ("share-x", "share-", None)] == ["share-x", "share-", "–"]
    assert points({"value": 0.031, "low": -0.01, "high": 0.072}) == ("+3.1", "−1.0 to 7.2", "4.1")
    assert points(None) == ("–", "", "")
