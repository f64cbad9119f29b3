"""Run folders whose files a disk, an editor or a stranger has changed: the report shows what is whole, going on is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srppo.config import build, dump
from srppo.errors import RunFolderError, SrppoError
from srppo.files import read_lines
from srppo.outcomes import read_answers, read_elapsed, read_environment, read_outcome
from srppo.report import closing_line
from srppo.report.page import render
from srppo.report.plots import draw_all
from srppo.report.record import read_run
from srppo.run_folder import RunFolder
from tiny_card import full_card
from tiny_fuzz import VALUES, bounded, damaged, json_bytes, spoil, used_or_refused
from tiny_report import GROUPS, Page, write_run

GROUP = dict.fromkeys(("sampled", "sampled_low", "sampled_high", "greedy", "greedy_low", "greedy_high"), 0.5)
GROUP |= {"mean_length": 5.0, "greedy_mean_length": 5.0, "eos_rate": 1.0, "n": 3, "samples": 1}
SHARE = {"share": 0.5, "step": 3, "loss": 1.0, "folder": "sft_checkpoints/share-0.5"}
COMPUTE = {"forward_tokens": 5, "trained_tokens": 5, "passes": 20}
OUTCOMES: dict[str, Any] = {
    "evaluate-base": {"groups": {"all": GROUP}, "lost_and_gained": {}, "heldout_nll": 1.0},
    "evaluate-srppo": {"groups": {"all": GROUP}, "lost_and_gained": {"all": {"lost": 0.1}}, "forgetting": {"nats_per_token": 0.1}},
    "sft": {"steps": 3, "checkpoints": [SHARE], "kept": SHARE, "compute": COMPUTE, "seconds": 1.0},
    "ppo": {"iterations": 3, "final_beta": 0.1, "compute": COMPUTE},
    "start": {"held": "share-0.5"},
    "diagnose": {
        "verdict": "go",
        "reasons": ["because"],
        "decision": {"start": "share-0.5", "numerator": "share-0.5", "beta": 0.1, "automatic": ["sft.keep"], "gain": {"value": 1.0}},
    },
}
ANSWER = {"group": "g", "row": 1, "prompt": "p", "sampled": ["a"], "sampled_scores": [1.0]}
ANSWER |= {"greedy": "a", "greedy_score": 1.0, "lengths": [3]}
ELAPSED = {"seconds": 9.0, "peak_rss_mb": 5.0, "stages": {"ppo": {"seconds": 5.0, "peak_rss_mb": 4.0}}}
SHOWN = ("config.yaml", "environment.json", "data.json", "summary.json", "elapsed.json", "diagnose.json", "metrics.jsonl", "samples.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a card, answers, figures of time, and few enough lines to be read often."""
    run = write_run(tmp_path_factory.mktemp("fuzz") / "run", iterations=4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:6] + lines[-6:]))
    for file in (run / "evaluation").iterdir():
        file.write_text("".join(file.read_text().splitlines(keepends=True)[::25]))
    (run / "diagnose.json").write_text(json.dumps(full_card().to_dict()))
    (run / "elapsed.json").write_text(json.dumps(ELAPSED))
    with RunFolder.existing(run) as folder:
        timing = {f"timing/{name}": 20.0 for name in ("rollout", "score", "update", "checkpoint", "critic", "cpu", "waited")}
        memory = {f"memory/{name}": 900.0 for name in ("rollout", "score", "update")}
        for k in range(5, 9):
            folder.log({"stage": "ppo", "iteration": k, "padding_share": 0.4, "update/tokens_per_second": 9.0, **timing, **memory})
    return run


def spoiled(data: st.DataObject, path: Path) -> bytes:
    """The file with an accident of bytes, or with another value somewhere."""
    whole = path.read_bytes()
    if path.suffix == ".yaml" or data.draw(st.booleans()):
        mark = b"# srppo run\n" if path.suffix == ".yaml" else b""
        return mark + data.draw(damaged(whole.removeprefix(mark)))
    if path.suffix == ".jsonl":
        lines = whole.splitlines(keepends=True)
        at = data.draw(st.integers(0, len(lines) - 1))
        return b"".join(lines[:at]) + json_bytes(spoil(data, json.loads(lines[at]))) + b"\n" + b"".join(lines[at + 1 :])
    return json_bytes(spoil(data, json.loads(whole)))


def show(run: Path) -> Page:
    page = Page(render(read_run(run), []))
    assert {t for t, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed", "link", "base", "form", "a"})
    assert all(not k.startswith("on") for _, a in page.tags for k in a)
    closing_line(run)
    return page


@bounded(24)
@given(data=st.data())
def test_the_page_of_any_run(finished: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*SHOWN, "evaluation/srppo.jsonl", "evaluation/sft.jsonl"]))
    path = finished / name
    whole = path.read_bytes()
    try:
        path.write_bytes(spoiled(data, path))
        used_or_refused(lambda: show(finished), finished, str(finished))
    finally:
        path.write_bytes(whole)


@bounded(2)
@given(data=st.data())
def test_the_plots_of_any_run(finished: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["metrics.jsonl", "summary.json", "diagnose.json"]))
    path = finished / name
    whole = path.read_bytes()
    try:
        path.write_bytes(spoiled(data, path))
        used_or_refused(lambda: draw_all(read_run(finished)))
    finally:
        path.write_bytes(whole)


@bounded(40)
@given(data=st.data())
def test_the_page_of_an_unfinished_run(finished: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.getbasetemp() / "unfinished"
    (run / "stages").mkdir(parents=True, exist_ok=True)
    shutil.copy(finished / "config.yaml", run)
    name = data.draw(st.sampled_from(["evaluate-base", "evaluate-srppo"]))
    (run / f"stages/{name}.json").write_bytes(json_bytes(spoil(data, OUTCOMES[name])))
    show(run)


@bounded(250)
@given(data=st.data())
def test_the_outcome_of_a_stage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """What is accepted has what the code that goes on from it takes for granted."""
    name = data.draw(st.sampled_from(sorted(OUTCOMES)))
    path = tmp_path_factory.getbasetemp() / f"{name}.json"
    content = json_bytes(spoil(data, OUTCOMES[name])) if data.draw(st.booleans()) else data.draw(damaged(json_bytes(OUTCOMES[name])))
    path.write_bytes(content)
    if used_or_refused(lambda: read_outcome(path, name), None, str(path)) is None:
        found = read_outcome(path, name)
        if name.startswith("evaluate"):
            assert all(set(g) == set(GROUP) for g in found["groups"].values())
        if found.get("kept"):
            assert ".." not in str(found["kept"].get("folder")) and not str(found["kept"].get("folder")).startswith("/")


@bounded(120)
@given(data=st.data())
def test_answers_elapsed_and_environment(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "file.json"
    environment = {"python": "3", "hardware": {"cpu": "x"}, "before_resume": [{"python": "2"}]}
    read, whole = data.draw(st.sampled_from([(read_answers, ANSWER), (read_elapsed, ELAPSED), (read_environment, environment)]))
    path.write_bytes(json_bytes(spoil(data, whole)) if data.draw(st.booleans()) else data.draw(damaged(json_bytes(whole) + b"\n")))
    if used_or_refused(lambda: read(path), None, str(path)) is None and read is read_answers:
        for row in read_answers(path):
            assert set(row) == set(ANSWER)


@bounded(40)
@given(data=st.data())
def test_going_on_with_any_run(finished: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Opened to be resumed: what is refused is left as it was."""
    run = tmp_path_factory.getbasetemp() / "resumed"
    shutil.rmtree(run, ignore_errors=True)
    with RunFolder.open(run, dump(build({}))) as folder:
        folder.log({"stage": "sft", "step": 1, "loss": 2.0})
        folder.samples(1, [{"prompt": "p", "response": "r"}])
    name = data.draw(st.sampled_from(["config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl"]))
    (run / name).write_bytes(spoiled(data, run / name))

    def go_on() -> None:
        with RunFolder.open(run, dump(build({})), resume=True) as folder:
            folder.truncate_metrics(0, "sft")
            folder.metrics()

    try:
        go_on()
    except SrppoError as error:
        assert str(run) in str(error)


@bounded(60)
@given(content=st.one_of(damaged(b'{"a": 1}\n{"b": 2}\n{"c": 3}\n'), VALUES.map(json_bytes)))
def test_lines(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(content)
    used_or_refused(lambda: read_lines(path), None, str(path))


# Found by the tests above.
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", {"srppo": [1], "sft": {"all": 3}, "base": {"all": {"sampled": "x", "n": True}}}),
        ("summary.json", {"heldout_nll": {"base": "x"}, "forgetting": [], "lost_and_gained": {"sft": {"all": 1}}, "ppo_training": 3}),
        ("summary.json", {"wall_seconds": [], "peak_rss_mb": "many", "warnings": 5, "seed": {}}),
        ("summary.json", {"srppo": {"all": {"sampled": 10**400, "n": 1e308}}}),
        ("environment.json", {"hardware": "none"}),
        ("environment.json", {"hardware": {"gpus": [1], "memory_gb": "x"}}),
        ("elapsed.json", {"stages": {"ppo": {"seconds": 1e308, "peak_rss_mb": 10**400}}}),
        ("metrics.jsonl", {"stage": ["ppo"], "iteration": "x", "timing/update": {}, "objective/kl": 10**400}),
        ("samples.jsonl", {"stage": "ppo", "iteration": [1]}),
        ("evaluation/srppo.jsonl", {"group": GROUPS[0], "row": [], "prompt": {}, "sampled": 3, "sampled_scores": ["x"]}),
        ("evaluation/srppo.jsonl", {"group": GROUPS[0], "row": 1, "prompt": "p", "sampled_scores": [None, None]}),
        ("data.json", json.loads("[" * 300 + "]" * 300)),
    ],
)
def test_what_once_was_a_traceback(finished: Path, name: str, content: Any) -> None:
    path = finished / name
    whole = path.read_bytes()
    try:
        path.write_bytes(json_bytes(content) + b"\n")
        assert "This run is not complete" in show(finished).text or name == "elapsed.json"
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("folder", ["../../other", "/etc", "a/../../b", "a\nb"])
def test_a_checkpoint_elsewhere_is_refused(tmp_path: Path, folder: str) -> None:
    path = tmp_path / "sft.json"
    path.write_text(json.dumps({**OUTCOMES["sft"], "kept": {**SHARE, "folder": folder}}))
    with pytest.raises(RunFolderError, match="is no checkpoint of this run"):
        read_outcome(path, "sft")
