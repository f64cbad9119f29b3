"""The report: what it says of a made-up run whose answer is known, and that it says something true of a broken or hostile one."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from srppo.config import build, dump
from srppo.errors import RunFolderError
from srppo.report import plots, write_report
from srppo.report.compare import difference
from srppo.report.page import render
from srppo.report.plots import draw_all, draw_stages
from srppo.report.record import read_run
from srppo.report.words import findings, warnings
from srppo.run_folder import RunFolder

GROUPS = ("with_demonstrations", "without_demonstrations")
ACCURACY = {"base": (0.31, 0.30), "sft": (0.85, 0.59), "sft_continued": (0.97, 0.65), "srppo": (0.93, 0.74)}
GREEDY = {"base": (0.9, 0.93), "sft": (0.95, 0.9), "sft_continued": (0.98, 0.78), "srppo": (0.96, 0.82)}
PROMPTS = 200


def answer_rows(stage: str, prompts: int = PROMPTS) -> list[dict[str, Any]]:
    """Evaluation answers of which exactly round(accuracy * prompts) are right in each group."""
    rows = []
    for g, group in enumerate(GROUPS):
        order = list(range(prompts))
        random.Random(g).shuffle(order)  # the same prompts are easy for every stage, as in a real run
        right = set(order[: round(ACCURACY[stage][g] * prompts)])
        greedy = set(order[: round(GREEDY[stage][g] * prompts)])
        for i in range(prompts):
            rows.append(
                {
                    "group": group,
                    "row": i,
                    "prompt": f"reverse: w{i} =",
                    "sampled": [f"{i}w" if i in right else f"w{i} and then"],
                    "sampled_scores": [float(i in right)],
                    "greedy": f"{i}w",
                    "greedy_score": float(i in greedy),
                    "lengths": [4],
                }
            )
    return rows


def write_run(path: Path, *, stages: tuple[str, ...] = tuple(ACCURACY), iterations: int = 25, answers: bool = True) -> Path:
    """A run folder as a finished run leaves it, with figures like those of the small world."""
    config = build({"model": {"name": "tiny"}, "data": {"demonstrations": "d.jsonl"}, "output": str(path), "evaluation": {"every": 5}})
    rng = random.Random(0)
    with RunFolder.open(path, dump(config)) as run:
        run.write_json("data.json", {"demonstrations": {"train": 64, "held out": 16, "tokens": {"mean": 21.5, "max": 40}}, "dropped": []})
        for step in range(1, 61):
            run.log({"stage": "sft", "step": step, "loss": 2 * math.exp(-step / 20) + 0.3 + 0.05 * rng.random(), "lr": 1e-4})
            if step % 15 == 0:
                run.log({"stage": "sft", "step": step, "heldout_nll": 2 * math.exp(-step / 18) + 0.4})
        for k in range(1, iterations + 1):
            record = {
                "objective/scores": 3 + 0.15 * k + 0.2 * rng.random(),
                "objective/rlhf_reward": 3 + 0.1 * k + 0.2 * rng.random(),
                "objective/kl": 0.03 * k + 0.02 * rng.random(),
                "completions/mean_length": 9 + 0.02 * k + 0.2 * rng.random(),
                "completions/clipped_ratio": 0.01,
                "reward_length_correlation": 0.1,
            }
            if k % 5 == 0:
                record |= {f"eval/{g}/sampled": ACCURACY["sft"][i] + 0.006 * k for i, g in enumerate(GROUPS)}
                record |= {f"eval/{g}/greedy": 0.9 for g in GROUPS}
            run.log({"stage": "ppo", "iteration": k, **record})
            rows = [
                {
                    "prompt": f"reverse: ab{j} =",
                    "response": f" {j}ba",
                    "group": GROUPS[0],
                    "score": 3.1,
                    "kl": 0.2,
                    "length": 5,
                    "ended": True,
                }
                for j in range(8)
            ]
            run.samples(k, rows)
        for step in range(1, 121):
            run.log({"stage": "sft_continued", "step": step, "loss": 0.3 * math.exp(-step / 60) + 0.2})
        summary: dict[str, Any] = {"seed": 0, "wall_seconds": 131.0, "peak_rss_mb": 812.0, "versions": {"srppo": "0.1.0"}}
        for stage in stages:
            summary[stage] = {
                g: {
                    "sampled": ACCURACY[stage][i],
                    "sampled_low": ACCURACY[stage][i] - 0.05,
                    "sampled_high": ACCURACY[stage][i] + 0.05,
                    "greedy": GREEDY[stage][i],
                    "greedy_low": GREEDY[stage][i] - 0.03,
                    "greedy_high": GREEDY[stage][i] + 0.03,
                    "mean_length": 9.3,
                    "eos_rate": 0.99,
                    "n": PROMPTS,
                    "samples": 1,
                }
                for i, g in enumerate(GROUPS)
            }
            if answers:
                (path / "evaluation").mkdir(exist_ok=True)
                (path / "evaluation" / f"{stage}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in answer_rows(stage)))
        summary |= {
            "heldout_nll": dict.fromkeys(stages, 0.5),
            "lost_and_gained": {s: {g: {"lost": 0.04, "gained": 0.2, "base_right": 180.0} for g in GROUPS} for s in stages if s != "base"},
            "forgetting": {s: {"nats_per_token": 0.12, "nats_per_response": 1.1, "n": 32.0} for s in stages},
        }
        run.write_json("summary.json", summary)
    return path


class Page(HTMLParser):
    """Tags, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: Path) -> Page:
    """Without the plots, which take longest."""
    return Page(render(read_run(run), []))


def text_of(run: Path) -> str:
    return " ".join(page_of(run).text.split())


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
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


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


# --- partial, damaged, hostile


def test_run_that_has_just_begun(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", dump(build({}))).close()
    text = " ".join(Page(write_report(tmp_path / "run").read_text()).text.split())
    assert "This run is not complete" in text and "summary.json: the summary" in text and "no evaluation of SRPPO" in text
    assert "There is nothing to compare yet" in text
    assert not list((tmp_path / "run" / "plots").iterdir())


def test_unfinished_run_shows_its_finished_evaluations(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=("base", "sft"))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    (run / "stages").mkdir()
    for stage in ("base", "sft"):
        (run / "stages" / f"evaluate-{stage}.json").write_text(json.dumps({"groups": summary[stage], "heldout_nll": 0.5}))
    text = text_of(run)
    assert "85.0 %" in text and "0.500" in text and "no evaluation of SRPPO" in text and "no evaluation of SFT" not in text


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "data.json", "summary.json", "metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("content", [None, b"{\xff broken: [\n{}\n", b"[]", b"", b"null\n"])
def test_any_file_missing_or_damaged(run: Path, name: str, content: bytes | None) -> None:
    if content is None and name == "config.yaml":
        pytest.skip("then it is no run folder")
    (run / name).unlink() if content is None else (run / name).write_bytes(b"# srppo run\n" * (name == "config.yaml") + content)
    record = read_run(run)
    assert "srppo" in render(record, [])
    if name not in ("config.yaml",) and content not in (b"[]", b"null\n"):
        assert any(name in line for line in record.missing)


def test_stages_without_a_scorer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", answers=False)
    summary = json.loads((run / "summary.json").read_text())
    for stage in ACCURACY:
        for result in summary[stage].values():
            result |= dict.fromkeys(("sampled", "sampled_low", "sampled_high", "greedy", "greedy_low", "greedy_high"))
    (run / "summary.json").write_text(json.dumps(summary))
    text = text_of(run)
    assert "There is nothing to compare yet" in text and "99.0 %" in text
    assert draw_stages(read_run(run)) is None


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        write_report(tmp_path)


def test_hostile_text_stays_text(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\x00{{ 7 * 7 }}'\"&\u202e"
    rows = [
        {"group": attack, "row": 0, "prompt": attack, "sampled": [attack], "sampled_scores": [1.0], "greedy": attack, "greedy_score": 0.0}
    ]
    for stage in ACCURACY:
        (run / "evaluation" / f"{stage}.jsonl").write_text(json.dumps(rows[0]) + "\n")
    summary = json.loads((run / "summary.json").read_text())
    for stage in ACCURACY:
        summary[stage] = {attack: summary[stage][GROUPS[0]], "$\\frac{1}$": summary[stage][GROUPS[1]]}
    summary["warnings"] = [attack]
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "data.json").write_text(json.dumps({attack: attack}))
    with RunFolder.existing(run) as folder:
        folder.samples(99, [{"prompt": attack, "response": attack, "score": attack}])
        folder.log({"stage": "ppo", "iteration": 2, f"eval/{attack}/sampled": 0.5})
    monkeypatch.setattr(plots, "PLOTS", {name: plots.PLOTS[name] for name in ("stages", "accuracy")})  # those that show group names
    assert [p.name for p in draw_all(read_run(run))] == ["stages", "accuracy"]
    page = page_of(run)
    assert {t for t, _ in page.tags}.isdisjoint({"script"})
    assert all(str(a.get("src", "data:")).startswith("data:") and not any(k.startswith("on") for k in a) for _, a in page.tags)
    assert "{{ 7 * 7 }}" in page.text and "<script>alert(1)</script>" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page.text)


def test_long_texts_are_cut_and_said_so(run: Path) -> None:
    with RunFolder.existing(run) as folder:
        folder.samples(99, [{"prompt": "p", "response": "y" * 100_000}])
    assert "… (98500 characters more)" in text_of(run)


def test_many_groups_are_drawn(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for stage in ACCURACY:
        summary[stage] = {f"task_{i}": summary[stage][GROUPS[0]] for i in range(20)}
    (run / "summary.json").write_text(json.dumps(summary))
    assert draw_stages(read_run(run)) is not None
    assert "task 19" in text_of(run)
