"""The reward card for people: what the report says of a made-up card, of one that lacks most, of a hostile one."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest

from srppo.diagnose.reward_card import RewardCard, TokenMap
from srppo.report import reward_card, write_report
from srppo.report.plots import draw_all
from srppo.report.record import read_run
from srppo.report.reward_card import choice_of, headline_of, length_of
from srppo.run_folder import RunFolder
from tiny_card import bare_card, full_card, hostile_card, told
from tiny_report import Page, page_of, text_of, write_run


def with_card(run: Path, card: RewardCard | Any) -> Path:
    with RunFolder.existing(run) as folder:
        folder.write_json("diagnose.json", card.to_dict() if isinstance(card, RewardCard) else card)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has only just begun."""
    from srppo.config import build, dump

    RunFolder.open(tmp_path / "run", dump(build({}))).close()
    return tmp_path / "run"


# --- in the report


def test_page_shows_the_card(run: Path) -> None:
    with_card(run, full_card())
    page = page_of(run)
    text = " ".join(page.text.split())
    for expected in (
        "Is the reward trustworthy?",
        "CAUTION. PPO may help",
        "83 %77 to 88",
        "Where PPO is heading",
        "Token by token",
        "48 + 24 = 72.",
    ):
        assert expected in text, expected
    assert not any(tag == "img" for tag, _ in page.tags)  # they were not drawn
    order = [text.index(w) for w in ("demonstrationreward", "SFT samplereward", "base samplereward")]
    assert order == sorted(order)
    titles = [a["title"] or "" for t, a in page.tags if t == "span" and "title" in a]
    assert len(titles) == 7 * 20 and all(re.fullmatch(r"[+−]\d+\.\d\d nats", t) for t in titles)
    assert sum(t == "tr" and a.get("class") == "chosen" for t, a in page.tags) == 4  # held-out, two groups, the candidates


def test_plots_of_the_card(run: Path) -> None:
    with_card(run, full_card(tuple(f"task_{i}" for i in range(10))))
    with RunFolder.existing(run) as folder:
        for k in range(0, 25, 5):
            folder.log({"stage": "ppo", "iteration": k, "guard/heldout_nll": 20 - k / 5, "guard/criterion": k / 10, "guard/auc": 0.8})
        folder.write_json("summary.json", {"ppo_training": {"kept_round": 15}})
    write_report(run)
    assert {p.stem for p in (run / "plots").iterdir()} == {"card_beta", "card_spread", "guard"}
    for plot in (run / "plots").iterdir():
        content = plot.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and width > 600 and height > 200
    page = Page((run / "report.html").read_text())
    assert sum(t == "img" for t, _ in page.tags) == 3


def test_no_card_no_section(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record = read_run(run)
    assert record.card == {} and record.missing == []
    assert "Is the reward trustworthy?" not in text_of(run)


@pytest.mark.parametrize("content", [b"{\xff broken", b"[]", b"null", b"{}", b""])
def test_damaged_card(run: Path, content: bytes) -> None:
    (run / "diagnose.json").write_bytes(content)
    assert "trustworthy" not in text_of(run) and draw_all(read_run(run)) == []
    if content in (b"{\xff broken", b""):
        assert any("diagnose.json" in line for line in read_run(run).missing)


@pytest.mark.parametrize("value", [None, [], {}, "text", 3.5, [None, 1, "x", {}], {"value": "x"}])
def test_any_part_of_the_card_absent_or_odd(run: Path, value: Any) -> None:
    """The page is written whatever one field of the card, or of its first rows, holds."""
    whole = full_card().to_dict()
    for key, content in whole.items():
        with_card(run, whole | {key: value})
        assert "Is the reward trustworthy?" in text_of(run)
        first = content[0] if isinstance(content, list) and content else content
        if isinstance(first, dict):
            spoiled = [dict.fromkeys(first, value), *content[1:]] if isinstance(content, list) else dict.fromkeys(first, value)
            with_card(run, whole | {key: spoiled})
            assert "Is the reward trustworthy?" in text_of(run)


def test_plots_of_odd_cards(run: Path) -> None:
    whole = full_card().to_dict()
    for value in (None, [], "x", -1.0):
        spoiled = {k: [dict.fromkeys(whole[k][0], value), *whole[k][1:3]] for k in ("betas", "spreads")}
        with_card(run, whole | spoiled | {"decision": value})
        assert [p.name for p in draw_all(read_run(run))] == ["card_beta", "card_spread"]
    with_card(run, bare_card())
    assert [p.name for p in draw_all(read_run(run))] == ["card_beta"]  # the expected length is known


def test_card_that_lacks_most_is_shown(run: Path) -> None:
    with_card(run, bare_card())
    text = text_of(run)
    assert "NO-GO. PPO on this reward" in text and "Token by token" not in text and "None" not in text


def test_hostile_card_stays_text(run: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\x00{{ 7 * 7 }}'\"&\u202e $\\frac{1}$"
    with_card(run, hostile_card(attack))
    page = page_of(run)
    assert {t for t, _ in page.tags}.isdisjoint({"script", "img"})
    assert not any(k.startswith("on") for _, attributes in page.tags for k in attributes)
    assert "{{ 7 * 7 }}" in page.text and "<script>alert(1)</script>" in page.text
    for text in (page.text, told(hostile_card(attack)), told(hostile_card(attack), "json")):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert [p.name for p in draw_all(read_run(run))] == ["card_beta", "card_spread"]


# --- the heat map


def test_colours_are_symmetric_and_clipped() -> None:
    assert reward_card.colour(0.0, 2.0) == "#ffffff"
    assert reward_card.colour(2.0, 2.0) == reward_card.colour(99.0, 2.0) == "#5aa0dc"
    assert reward_card.colour(-2.0, 2.0) == reward_card.colour(-99.0, 2.0) == "#f5963c"
    assert reward_card.colour(1.0, 2.0) == "#acd0ee"  # half way between white and the blue
    assert reward_card.colour("red; background: url(x)", 2.0) == "#dddddd"


def test_scale_is_a_high_percentile() -> None:
    assert reward_card.strongest([*[1.0] * 94, *[-2.0] * 5, 1000.0]) == 2.0
    assert reward_card.strongest([]) == 1.0 and reward_card.strongest([0.0]) == 0.01


def test_invisible_tokens_are_visible() -> None:
    assert [reward_card.visible(t) for t in ("\n", "\t", "\x1b[2J", "", " a")] == ["↵\n", "⇥", "·", "·", " a"]


def test_long_responses_and_many_prompts_are_cut_and_said_so(run: Path) -> None:
    long = TokenMap("sft", "all", "p", ["x"] * 1000, [0.1] * 1000, 100.0, None)
    others = [TokenMap("sft", "all", f"p{i}", ["x"], [0.1], 0.1, None) for i in range(30)]
    with_card(run, full_card().to_dict() | {"maps": [vars(m) for m in (long, *others)]})
    text = text_of(run)
    assert "(600 more tokens)" in text and "7 more prompts are in diagnose.json" in text


def test_two_prompts_without_text_are_two_blocks(run: Path) -> None:
    rows = [TokenMap(a, "held-out", "", ["x"], [0.1], 0.1, None) for _ in range(2) for a in ("demonstration", "sft", "base")]
    with_card(run, full_card().to_dict() | {"maps": [vars(m) for m in rows]})
    assert sum(t == "div" and a.get("class") == "heat" for t, a in page_of(run).tags) == 2


# --- sentences


def test_sentences_of_an_empty_card() -> None:
    assert headline_of({}) == "–" and length_of({}) == []
    assert "start from – (set in the recipe)" in choice_of({})
    assert "hardly depends on" in length_of({"length_bias": {"spearman": -0.1}})[0]
