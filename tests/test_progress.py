"""What the four reporters print, with a clock of our own; and that no text of a model can drive the terminal."""

from __future__ import annotations

import io
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srppo.progress import LIVE_INTERVAL, PLAIN_INTERVAL, LiveProgress, Meter, PlainProgress, make_progress
from srppo.text import clean, duration, number, percent

HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m [bold red]x[/bold red] \x9b5mblink \x1bP1;1q\x1b\\ \u202ereversed\u2066 \x07\x08\r\x00end"
)
HARMLESS = "red [bold red]x[/bold red] blink  reversed end"


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def json_events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# --- text


def test_clean_strips_what_drives_a_terminal() -> None:
    assert clean(HOSTILE) == HARMLESS
    assert clean("a\tb\nc\r\nd é 漢 😀") == "a\tb\nc\nd é 漢 😀"


@given(st.text(st.characters(codec=None)))
def test_clean_leaves_no_control_character(text: str) -> None:
    out = clean(text)
    assert not [c for c in out if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    assert not [c for c in out if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")]
    assert clean(out) == out
    out.encode("utf-8")


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_clean_changes_no_ordinary_text(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.73124, "0.731"),
        (12345.6, "12346"),
        (1e-05, "1e-05"),
        (float("nan"), "nan"),
        (3, "3"),
        (True, "True"),
        ("\x1b[1mx", "x"),
        (2e7, "2e+07"),
    ],
)
def test_number(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3599.7, "1 h 00 min"), (4020, "1 h 07 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percent() -> None:
    assert percent(0.7312) == "73.1 %" and percent(None) == "–" and percent(1.0, 0) == "100 %"


# --- rate and time left


def test_meter_rate_and_eta() -> None:
    """4 of 10 units in 8 s: 0.5 a second, 12 s left; 3 s later without news 9 s left, at the same rate."""
    clock = Clock()
    meter = Meter(10, "steps", 0, clock)
    assert meter.rate == 0 and meter.eta is None
    clock.now += 8
    meter.update(4, {"loss": 2.0})
    assert meter.rate == 0.5 and meter.eta == 12.0 and meter.rate_text() == "2.0 s/step"
    clock.now += 3
    assert meter.rate == 0.5 and meter.eta == 9.0
    assert meter.position() == ["4/10 steps", "2.0 s/step", "9 s left"]


def test_meter_of_a_resumed_run_leaves_out_what_was_done_before() -> None:
    clock = Clock()
    meter = Meter(20, "rounds", 15, clock)
    clock.now += 10
    meter.update(16, {})
    assert meter.rate == 0.1 and meter.eta == 40.0


def test_key_metrics_come_first_and_few_are_shown() -> None:
    meter = Meter(1, "steps", 0, Clock())
    meter.update(1, {f"other/m{i}": 1.0 for i in range(9)} | {"objective/kl": 0.5, "objective/scores": 3.25, "accuracy": 0.5})
    assert meter.metrics_text() == "reward 3.25  kl 0.5  accuracy 0.5  m0 1  m1 1"


# --- plain


def test_plain_says_a_line_every_few_seconds_and_the_last() -> None:
    clock, out = Clock(), io.StringIO()
    with PlainProgress(out, clock).stage("SFT", 100, "steps") as stage:
        for i in range(1, 101):
            clock.now += 0.2
            stage.advance(i, loss=1.0 / i)
    lines = out.getvalue().splitlines()
    assert len(lines) == pytest.approx(20 / PLAIN_INTERVAL, abs=1)
    assert lines[0] == "SFT: 25/100 steps, 5.0 steps/s, 15 s left, loss 0.04"
    assert lines[-1] == "SFT: 100/100 steps, in 20 s, loss 0.01"


def test_plain_is_silent_on_short_inner_stages() -> None:
    clock, out = Clock(), io.StringIO()
    progress = PlainProgress(out, clock)
    with progress.stage("PPO", 2, "rounds") as outer:
        for k in (1, 2):
            with progress.stage("rollouts", 8, "rollouts") as inner:
                clock.now += 1 if k == 1 else 7
                inner.advance(4)
                inner.advance(8)
            outer.advance(k)
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == ["rollouts", "rollouts", "PPO"]
    assert out.getvalue().count("rollouts: 8/8") == 1


def test_plain_tells_an_aborted_stage_as_it_is() -> None:
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), PlainProgress(out, Clock()).stage("PPO", 5, "rounds") as stage:
        stage.advance(2)
        raise KeyboardInterrupt
    assert out.getvalue() == "PPO: 2/5 rounds, in 0 s\n"


def test_plain_text_is_clean_and_markup_is_text() -> None:
    out = io.StringIO()
    progress = PlainProgress(out, Clock())
    progress.note(HOSTILE)
    progress.warn(HOSTILE)
    progress.table(HOSTILE, ["a", HOSTILE], [[HOSTILE, 0.12345]])
    assert out.getvalue().startswith(f"{HARMLESS}\nwarning: {HARMLESS}\n")
    assert out.getvalue().count(HARMLESS) == 5
    assert "0.123" in out.getvalue() and not any(ord(c) < 32 and c != "\n" for c in out.getvalue())


# --- json


def test_json_is_one_strict_object_a_line() -> None:
    clock, out = Clock(), io.StringIO()
    progress = make_progress("json", out, clock)
    with progress.stage("PPO", 2, "rounds", start=1) as stage:
        clock.now += 3
        stage.advance(2, **{"objective/kl": float("nan"), "lr": 1e-5})
    progress.note(HOSTILE)
    progress.warn("careful\nnow")
    progress.table("T", ["stage", "sampled"], [["SFT", float("inf")]])
    assert json_events(out) == [
        {"event": "stage_start", "title": "PPO", "total": 2, "unit": "rounds", "start": 1},
        {"event": "advance", "title": "PPO", "done": 2, "total": 2, "seconds": 3.0, "metrics": {"objective/kl": None, "lr": 1e-5}},
        {"event": "stage_end", "title": "PPO", "done": 2, "total": 2, "seconds": 3.0, "metrics": {"objective/kl": None, "lr": 1e-5}},
        {"event": "note", "text": HARMLESS},
        {"event": "warn", "text": "careful\nnow"},
        {"event": "table", "title": "T", "columns": ["stage", "sampled"], "rows": [["SFT", None]]},
    ]


def test_json_is_throttled_but_keeps_the_last() -> None:
    clock, out = Clock(), io.StringIO()
    with make_progress("json", out, clock).stage("x", 1000, "rows") as stage:
        for i in range(1, 1001):
            clock.now += 0.001
            stage.advance(i)
    done = [e["done"] for e in json_events(out) if e["event"] == "advance"]
    assert done[-1] == 1000 and len(done) <= 2 + 1.0 / LIVE_INTERVAL


# --- quiet and live


def test_quiet_shows_tables_on_stdout_and_warnings_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress("quiet")
    with progress.stage("PPO", 2, "rounds") as stage:
        stage.advance(1, loss=1.0)
    progress.note("nothing")
    progress.warn(HOSTILE)
    progress.table("Results", ["", "sampled"], [["SFT", "59.0 %"]])
    out, err = capsys.readouterr()
    assert err == f"warning: {HARMLESS}\n"
    assert "Results" in out and "59.0 %" in out and "nothing" not in out and "PPO" not in out


def test_live_falls_back_to_plain_off_a_terminal() -> None:
    assert isinstance(make_progress("live", io.StringIO()), PlainProgress)
    assert isinstance(make_progress("live", Terminal()), LiveProgress)


def test_live_draws_bars_and_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    out, clock = Terminal(), Clock()
    progress = make_progress("live", out, clock)
    with pytest.raises(RuntimeError), progress.stage("PPO [red]", 4, "rounds") as outer:
        outer.advance(1, **{"objective/kl": 0.5})
        progress.note(HOSTILE)
        with progress.stage("rollouts", 8, "rollouts") as inner:
            clock.now += 2
            inner.advance(4)
            drawn = progress._draw().plain  # type: ignore[attr-defined]
        raise RuntimeError
    assert drawn.splitlines()[0].endswith("1/4 rounds") and "kl 0.5" in drawn
    assert "4/8 rollouts  2.0 rollouts/s  2 s left" in drawn
    text = out.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # hidden while drawing, shown at the end
    assert HARMLESS in text and "\x1b]0;" not in text and "\x9b" not in text
    assert "PPO [red]: 1/4 rounds" in text


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="live, plain, quiet, json"):
        make_progress("loud")
