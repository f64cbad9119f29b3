"""The page of runs that are partial, damaged or hostile."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from srppo.config import build, dump
from srppo.errors import RunFolderError
from srppo.report import plots, write_report
from srppo.report.page import render
from srppo.report.plots import draw_all, draw_stages
from srppo.report.record import read_run
from srppo.run_folder import RunFolder
from tiny_report import ACCURACY, GROUPS, Page, page_of, text_of, write_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


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
