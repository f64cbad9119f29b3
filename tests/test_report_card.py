"""The reward card for people: what the terminal and the report say of a made-up card, of one that lacks most, of a hostile one."""

from __future__ import annotations

import io
import json
import math
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from srppo.diagnose.reward_card import (
    BetaRow,
    Candidate,
    Decision,
    Estimate,
    LengthBias,
    Preference,
    PreviewRow,
    RewardCard,
    RewardSpread,
    TokenMap,
)
from srppo.diagnose.tell import tell
from srppo.progress import PlainProgress, make_progress
from srppo.report import reward_card, write_report
from srppo.report.card_words import checkpoint, nats, points
from srppo.report.plots import draw_all
from srppo.report.record import read_run
from srppo.report.reward_card import choice_of, headline_of, length_of
from srppo.run_folder import RunFolder
from test_report import Page, page_of, text_of, write_run

BETAS = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
NOTHING = Estimate(None)


def around(value: float, half: float, n: int = 48) -> Estimate:
    return Estimate(value, value - half, value + 0.9 * half, n)


def beta_row(beta: float, group: str) -> BetaRow:
    held, reach = group == "held-out", 1 / beta
    return BetaRow(
        beta,
        group,
        effective=math.exp(-0.25 * reach),
        kl=0.12 * reach**1.3,
        reward=2.1 + 0.5 * reach,
        length=18.4 + 0.8 * reach,
        match=0.31 + 0.03 * reach if held else None,
        gain=around(0.5 * reach - 0.12 * reach**2, 0.1 + 0.08 * reach) if held else None,
        accuracy=around(min(0.9, 0.55 + 0.06 * reach), 0.06),
        accuracy_gain=around(0.06 * reach - 0.012 * reach**2, 0.03),
    )


def token_map(author: str, prompt: str, group: str, rng: random.Random) -> TokenMap:
    centre = {"demonstration": 0.4, "sft": 0.25, "base": -0.5}[author]
    tokens = ["Let", " me", " see", ":", " ", "4", "8", " +", " 2", "4", " =", " ", "7", "2", ".", "\n", "So", " 7", "2", "<|im_end|>"]
    ratios = [rng.gauss(centre, 0.6) for _ in tokens]
    return TokenMap(author, group, prompt, tokens, ratios, sum(ratios), float(author != "base"))


def full_card(groups: tuple[str, ...] = ("with_demonstrations", "without_demonstrations")) -> RewardCard:
    rng = random.Random(0)
    everywhere = ("held-out", *groups)
    return RewardCard(
        verdict="caution",
        reasons=["The reward prefers longer answers (rank correlation +0.41).", "Only 41 held-out demonstrations were looked at."],
        decision=Decision("share-0.5", "sft", 1.5, around(0.28, 0.15), ["sft.keep", "reward.kl_coef"]),
        preferences=[
            Preference(against, bucket, around(0.83 - 0.02 * i, 0.06, 41 - 10 * i), around(3.4 - i, 0.8, 41 - 10 * i))
            for against in ("base", "sft")
            for i, bucket in enumerate(("all", "1 to 12 tokens", "13 to 24 tokens", "25 to 90 tokens"))
        ],
        length_bias=LengthBias(0.41, 0.07, 0.12, 0.22, 0.58, 0.34),
        betas=[beta_row(b, g) for g in everywhere for b in BETAS],
        spreads=[
            RewardSpread(a, g, m, 2.0, [m - 3.1, m - 1.2, m + 0.1, m + 1.3, m + 3.4], 18.4, 0.97, 384)
            for i, g in enumerate(everywhere)
            for a, m in (("base", -2.2 + 0.1 * i), ("sft", 2.1 - 0.15 * i))
        ],
        candidates=[
            Candidate(s, n, around(0.8, 0.05), 1.5, around(0.25, 0.1), 21.3, 21.05, (s, n) == ("share-0.5", "sft"))
            for s in ("share-0.25", "share-0.5", "sft")
            for n in ("share-0.5", "sft")
        ],
        preview=[
            PreviewRow(name, g, 2.0 + i, 18.0 + i, 0.97, 0.5 + 0.05 * i, 0.3 if g == "held-out" else None, [" 48 + 24 = 72.", " about 70"])
            for g in everywhere
            for i, name in enumerate(("base", "sft", "logits, beta 1.5", "weights, alpha 0.67"))
        ],
        maps=[
            token_map(a, f"Natalia sold {48 + i} clips in April and half as many in May. How many in all?", g, rng)
            for i, g in enumerate(everywhere)
            for a in ("base", "sft", "demonstration")
            if a != "demonstration" or g == "held-out"
        ],
        heldout=41,
        prompts=48,
        samples=8,
    )


def bare_card(text: str = "nothing to look at", verdict: Any = "no-go") -> RewardCard:
    """All that may be absent is."""
    return RewardCard(
        verdict,
        [text],
        Decision("sft", "sft", 1.0, NOTHING),
        [Preference("base", "all", NOTHING, NOTHING)],
        LengthBias(None, None, None, 0.0, 0.0, 0.0),
        [BetaRow(1.0, "all", 1.0, 0.0, 0.0, 3.0)],
        [],
        [],
        [],
        [],
        0,
        1,
        2,
    )


def hostile_card(attack: str) -> RewardCard:
    return RewardCard(
        "go",
        [attack],
        Decision(attack, attack, 1.0, NOTHING, [attack]),
        [Preference(attack, attack, around(0.5, 0.1), NOTHING)],
        LengthBias(None, None, None, 0.0, 0.0, 0.0),
        [beta_row(1.0, attack)],
        [RewardSpread(attack, attack, 0.0, 1.0, [-2.0, -1.0, 0.0, 1.0, 2.0], 3.0, 1.0, 4)],
        [Candidate(attack, attack, NOTHING, 1.0, NOTHING, 1.0, 1.0, True)] * 2,
        [PreviewRow(attack, attack, 0.0, 1.0, 1.0, None, None, [attack])],
        [TokenMap(attack, attack, attack, [attack, "\x00", "\u05d0"], [0.5, -0.5, 0.1], 0.1, None)],
        1,
        1,
        2,
    )


def told(card: RewardCard, mode: str = "plain") -> str:
    stream = io.StringIO()
    tell(card, make_progress(mode, stream))
    return stream.getvalue()


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


# --- in the terminal


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
