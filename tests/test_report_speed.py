"""The report's figures of speed and memory from a made-up run whose answer is known, and each rule of its advice at its threshold."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srppo.report import closing_line
from srppo.report.page import render
from srppo.report.plots import draw_all, draw_speed
from srppo.report.record import read_run
from srppo.report.speed import LEAST_SECONDS, Speed, advice, gib, speed_of
from tiny_report import Page, text_of, write_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 rounds; the second is a profiled one. Rollouts 10 s at 60 tokens/s, then 30 s at 20; every figure of the sums below is by hand."""
    path = write_run(tmp_path_factory.mktemp("speed") / "run", iterations=4, answers=False)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        k = row.get("iteration")
        if row["stage"] == "ppo" and k:
            row |= {"timing/rollout": 10.0, "timing/score": 5.0, "timing/update": 20.0, "timing/policy": 8.0, "timing/critic": 12.0}
            row |= {"timing/cpu": 30.0, "timing/waited": 10.0, "padding_share": 0.25, "memory/update": 2048.0, "memory/rollout": 100.0 * k}
            row |= {"rollout/tokens_per_second": 60.0, "score/tokens_per_second": 900.0, "update/tokens_per_second": 300.0}
        if k == 2:
            row |= {"timing/profiled": 1.0, "timing/update": 1000.0, "memory/update": 9999.0}
        if k == 3:
            row |= {"timing/rollout": 30.0, "rollout/tokens_per_second": 20.0, "timing/evaluate": 4.0, "timing/checkpoint": 1.0}
        if row["stage"] == "sft" and "loss" in row:
            row |= {"timing/step": 0.5, "tokens_per_second": 100.0, "padding_share": 0.1}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stages = {"sft": {"seconds": 30.0, "peak_rss_mb": 900.0}, "ppo": {"seconds": 150.0, "peak_rss_mb": 2500.0}}
    (path / "elapsed.json").write_text(json.dumps({"seconds": 200.0, "peak_rss_mb": 2500.0, "stages": stages | {"odd": 3}}))
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_figures_of_a_run(run: Path) -> None:
    speed = speed_of(read_run(run))
    assert speed.rounds == 3
    assert speed.seconds == {
        "rollout": 50.0,
        "score": 15.0,
        "update": 60.0,
        "evaluate": 4.0,
        "checkpoint": 1.0,
        "policy": 24.0,
        "critic": 36.0,
    }
    assert speed.total == 130.0 and speed.share("rollout") == pytest.approx(5 / 13) and speed.share("critic") == pytest.approx(36 / 130)
    # 600 tokens in each round, over 50 s: the rates' plain mean would say 46.7
    assert speed.rates == pytest.approx({"rollout": 36.0, "score": 900.0, "update": 300.0, "sft": 100.0})
    assert speed.peaks == {"rollout": 400.0, "update": 2048.0} and speed.reserved == {}
    assert speed.padding == pytest.approx({"ppo": 0.25, "sft": 0.1}) and speed.waited == pytest.approx(0.25)
    assert list(speed.stages) == ["sft", "ppo"]


def test_the_section_shows_them(run: Path) -> None:
    (run / "profile").mkdir()
    (run / "profile/round-2.json.gz").write_bytes(b"")
    text = text_of(run)
    for expected in ("Speed and memory", "rollouts50 s38 %36400 MiB", "of it the critic's steps36 s28 %", "update1 min 00 s46 %3002.0 GiB"):
        assert expected in text
    for expected in ("SFT30 s17 %10010 %900 MiB", "PPO2 min 30 s83 %25 %2.4 GiB", "they had none for 25 %", "profile/round-2.json.gz"):
        assert expected in text
    assert "For 25 % of the time that this run wanted a core" in text
    assert "reserved" not in text


def test_a_gpu_has_its_own_memory(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "memory/update" in row:
            row["memory/update_reserved"] = 4096.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert speed_of(read_run(run)).reserved == {"update": 4096.0}
    text = text_of(run)
    assert "peak memory of the GPU" in text and "4.0 GiB" in text and "2.4 GiB" in text  # of the process, by stage
    assert closing_line(run).endswith("peak memory 2.4 GiB (PPO), of the GPU 2.0 GiB in PPO")


def test_the_closing_line(run: Path) -> None:
    assert closing_line(run) == (
        "time: PPO 2 min 30 s (rollouts 38 %, scoring 12 %, update 46 %, evaluations 3 %, checkpoints 1 %), SFT 30 s; "
        "peak memory 2.4 GiB (PPO)"
    )


def test_the_plot_leaves_the_profiled_round_out(run: Path) -> None:
    figure = draw_speed(read_run(run))
    assert figure is not None
    (axes,) = figure.axes
    tops: dict[float, float] = {}
    for bar in axes.patches:
        middle = round(bar.get_x() + bar.get_width() / 2, 6)
        tops[middle] = max(tops.get(middle, 0.0), bar.get_y() + bar.get_height())
    assert tops == {1.0: 35.0, 3.0: 60.0, 4.0: 35.0}
    assert "speed" in {plot.name for plot in draw_all(read_run(run))}


def test_a_run_without_such_figures_has_no_section(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", answers=False)
    assert "Speed and memory" not in text_of(run) and closing_line(run) == "" and draw_speed(read_run(run)) is None
    (run / "elapsed.json").write_text('{"seconds": 3')
    assert "Speed and memory" not in text_of(run)
    (run / "elapsed.json").write_text(json.dumps({"stages": {"sft": {"seconds": "long", "peak_rss_mb": None}, "<b>x</b>": {}}}))
    assert "Speed and memory" not in text_of(run)


def test_damaged_figures_are_left_out(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row.get("iteration") == 1:
            row |= {"timing/rollout": None, "memory/update": "much", "timing/cpu": True, "timing/score": "<script>"}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    record = read_run(run)
    assert speed_of(record).seconds["rollout"] == 40.0
    assert "<script>" not in {tag for tag, _ in Page(render(record, [])).tags}


# --- the advice

CONFIG: dict[str, Any] = {
    "rollout": {"batch_size": 32},
    "ppo": {"prompts_per_iteration": 64, "samples_per_prompt": 2, "checkpoint_every": 1, "micro_batch_tokens": 8},
    "evaluation": {"every": 5},
    "guard": {"every": 2},
}
HARDWARE = {"memory_gb": 16.0, "threads": 2}
QUIET = Speed(5, {"rollout": 40.0, "score": 15.0, "update": 45.0, "critic": 22.0}, {}, {"update": 4000.0}, {}, {"ppo": 0.1}, 0.02, {})


def seconds(**changes: float) -> Speed:
    return replace(QUIET, seconds=QUIET.seconds | changes)


def test_nothing_is_said_where_nothing_is_off() -> None:
    assert advice(QUIET, CONFIG, HARDWARE) == []


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        (
            seconds(rollout=89.0),
            seconds(rollout=91.0),
            "Rollouts take 60 % of PPO's time, and rollout.batch_size decodes 32 of a round's 128",
        ),
        (seconds(critic=34.0), seconds(critic=36.0), "The critic's steps take 36 % of PPO's time: tuning.critic: least_squares"),
        (seconds(evaluate=21.0, guard=21.0), seconds(evaluate=24.0, guard=22.0), "a larger evaluation.every (now 5)"),
        (seconds(guard=42.0), seconds(guard=44.0), "a larger guard.every (now 2)"),
        (
            seconds(checkpoint=17.0),
            seconds(checkpoint=18.0),
            "Saving checkpoints takes 15 % of PPO's time: raise ppo.checkpoint_every (now 1)",
        ),
        (
            replace(QUIET, padding={"ppo": 0.29}),
            replace(QUIET, padding={"ppo": 0.3}),
            "30 % were padding: a smaller ppo.micro_batch_tokens (now 8)",
        ),
        (replace(QUIET, waited=0.19), replace(QUIET, waited=0.2), "For 20 % of the time that this run wanted a core it had none"),
        # 85 % of 16 GB are 13.6 GB, 12970 MiB
        (
            replace(QUIET, peaks={"update": 12900.0}),
            replace(QUIET, peaks={"update": 13000.0}),
            "Update reached 13.6 of the machine's 16.0 GB",
        ),
        (replace(QUIET, peaks={"rollout": 12900.0}), replace(QUIET, peaks={"rollout": 13000.0}), "a smaller rollout.batch_size needs less"),
    ],
)
def test_each_rule_at_its_threshold(below: Speed, above: Speed, expected: str) -> None:
    assert advice(below, CONFIG, HARDWARE) == []
    (said,) = advice(above, CONFIG, HARDWARE)
    assert expected in said
    few, short = replace(above, rounds=2), replace(above, seconds={k: v / 100 for k, v in above.seconds.items()})
    assert advice(few, CONFIG, HARDWARE) == advice(short, CONFIG, HARDWARE) == [] and short.total < LEAST_SECONDS


def test_advice_fits_the_configuration() -> None:
    wide = CONFIG | {"rollout": {"batch_size": 128}}
    assert advice(seconds(rollout=500.0), wide, HARDWARE) == []
    assert advice(seconds(rollout=500.0), {}, {}) == advice(seconds(rollout=500.0), {"ppo": "odd", "rollout": None}, {}) == []
    assert "`threads: 1`" in advice(replace(QUIET, waited=0.5), CONFIG, HARDWARE)[0]
    assert "threads" not in advice(replace(QUIET, waited=0.5), CONFIG, HARDWARE | {"threads": 1})[0]
    full = replace(QUIET, peaks={"update": 15000.0})
    assert advice(replace(full, reserved={"update": 20000.0}), CONFIG, HARDWARE) == []  # a GPU's memory against the machine's says nothing
    assert advice(full, CONFIG, {}) == []
    assert advice(seconds(checkpoint=50.0), {}, {})  # without the key's value, still said


def test_the_rules_are_documented() -> None:
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for threshold in (
        "3 rounds or 60 seconds",
        "for 20 % or more",
        "rollouts 60 %",
        "steps 35 %",
        "guard 30 %",
        "checkpoints 15 %",
        "padding 30 %",
        "85 %",
    ):
        assert threshold in page


@pytest.mark.parametrize(("mib", "text"), [(12.4, "12 MiB"), (999.0, "999 MiB"), (1000.0, "1.0 GiB"), (2560.0, "2.5 GiB")])
def test_gib(mib: float, text: str) -> None:
    assert gib(mib) == text
