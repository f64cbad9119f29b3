"""The report: what it says of a made-up run whose answer is known."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from srppo.report import write_report
from srppo.report.compare import difference
from srppo.report.page import render
from srppo.report.record import read_run
from srppo.report.words import findings, warnings
from tiny_report import GROUPS, PROMPTS, Page, text_of, write_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- a whole run


def test_page_and_plots_of_a_whole_run(run: Path) -> None:
    text = " ".join(Page(write_report(run).read_text()).text.split())
    names = {"stages", "accuracy", "reward", "kl", "length", "loss"}
    assert {p.stem for p in (run / "plots").iterdir()} == names
    for plot in (run / "plots").iterdir():
        content = plot.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and width > 600 and height > 200
    for expected in ("74.0 %", "59.0 %", "+15.0", "2 min 11 s", "without demonstrations", "reverse: w0 =", "This run is not complete"):
        assert (expected in text) is (expected != "This run is not complete"), expected


def test_page_asks_nothing_of_the_network(run: Path) -> None:
    page = Page(write_report(run).read_text())
    assert len([t for t, _ in page.tags if t == "img"]) == 6
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "action"):
            assert str(attributes.get(name, "data:")).startswith("data:")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def test_only_the_run_folder_is_read(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is the same whatever the working directory."""
    first = render(read_run(run), [])
    monkeypatch.chdir(tmp_path)
    assert render(read_run("run"), []) == first


# --- words


def test_findings_of_the_made_up_run(run: Path) -> None:
    record = read_run(run)
    said = "\n".join(findings(record))
    assert "with demonstrations: SRPPO answers 93.0 % right, SFT 85.0 %: better, beyond the noise (+8.0 points" in said
    assert "without demonstrations: SRPPO answers 74.0 % right, SFT 59.0 %: better, beyond the noise (+15.0 points" in said
    assert "continued SFT (trained further with PPO's compute) 97.0 %: worse, beyond the noise (−4.0 points" in said
    assert "SRPPO no longer does: 4.0 % (with demonstrations)" in said
    # the mean of 3 + .15 k over k = 1..5 and 21..25 is 3.45 and 6.45; the noise of .2 adds .1 on average
    reward = re.search(r"the reward went from ([\d.]+) to ([\d.]+)", said)
    assert reward and [float(x) for x in reward.groups()] == pytest.approx([3.55, 6.55], abs=0.12)
    assert "hardly depends on length (correlation +0.10 at the end)" in said
    assert warnings(record) == []


def test_interval_of_the_difference_is_the_paired_one(run: Path) -> None:
    """Stages right on nested sets of prompts differ on exactly gain * n of them: the paired standard error is sqrt(p (1 - p) / n)."""
    record = read_run(run)
    found = difference(record, GROUPS[1], "srppo", "sft")
    assert found is not None and found.gain == pytest.approx(0.15)
    half = 1.96 * math.sqrt(0.15 * 0.85 / PROMPTS)
    assert (found.low, found.high) == pytest.approx((0.15 - half, 0.15 + half), abs=0.012)


def test_interval_without_answers_is_of_independent_means(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "run", answers=False))
    found = difference(record, GROUPS[1], "srppo", "sft")
    assert found is not None and (found.low, found.high) == pytest.approx((0.15 - 0.05 * math.sqrt(2), 0.15 + 0.05 * math.sqrt(2)))
    assert found.clear


def test_noise_is_called_noise(run: Path) -> None:
    """One prompt of 200 more is no finding."""
    rows = [json.loads(line) for line in (run / "evaluation" / "sft.jsonl").read_text().splitlines()]
    wrong = next(r for r in rows if r["group"] == GROUPS[1] and r["sampled_scores"] == [0.0])
    wrong["sampled_scores"] = [1.0]
    (run / "evaluation" / "srppo.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = difference(read_run(run), GROUPS[1], "srppo", "sft")
    assert found is not None and found.gain == pytest.approx(1 / PROMPTS) and not found.clear
    assert "no clear difference (+0.5 points" in text_of(run)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"summary": {"srppo": {GROUPS[0]: {"eos_rate": 0.5}}}}, "SRPPO ends only 50 % of its answers on with demonstrations"),
        ({"summary": {"srppo": {GROUPS[0]: {"n": 12}}}}, "with demonstrations: only 12 evaluation prompts"),
        ({"summary": {"warnings": ["mind the gap"]}}, "mind the gap"),
        ({"metrics": {"policy/skipped_steps": 3.0}}, "3 steps skipped for a NaN or infinite loss"),
        ({"metrics": {"completions/clipped_ratio": 0.4}}, "40 % of the last rollouts were cut at 256 tokens"),
        ({"metrics": {"reward_length_correlation": 0.6, "completions/mean_length": lambda k: 10.0 * k}}, "length bias"),
        ({"metrics": {f"eval/{GROUPS[0]}/sampled": lambda k: 0.9 - 0.01 * k}}, "over-optimisation"),
    ],
)
def test_warnings(run: Path, change: dict[str, Any], expected: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for key, value in change.get("summary", {}).items():
        if isinstance(value, list):
            summary[key] = value
        else:
            for group, fields in value.items():
                summary[key][group] |= fields
    (run / "summary.json").write_text(json.dumps(summary))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["stage"] == "ppo":
            record |= {k: v(record["iteration"]) if callable(v) else v for k, v in change.get("metrics", {}).items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert any(expected in w for w in warnings(read_run(run)))
    assert expected in text_of(run)
