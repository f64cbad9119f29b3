"""The run folder: what it refuses, what survives a crash and a second process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from srppo.config import build, dump
from srppo.errors import RunFolderError
from srppo.files import read_lines
from srppo.run_config import load_run_config
from srppo.run_folder import HARMLESS, MARK, RunFolder, is_run

CONFIG = dump(build({}))


def changed(**values: Any) -> str:
    """The configuration with other values, sections as keyword arguments."""
    return dump(build(values))


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, the lock aside."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def start(folder: Path, text: str = CONFIG) -> Path:
    """A run with something in it, closed."""
    with RunFolder.open(folder, text) as run:
        run.log({"stage": "sft", "step": 1, "loss": 2.0})
        (folder / "policy").mkdir()
        (folder / "policy" / "model.safetensors").write_bytes(b"weights")
    return folder


# --- opening


def test_new_folder_holds_config_and_environment(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "a" / "run", CONFIG) as run:
        assert not run.resumed
    path = tmp_path / "a" / "run"
    assert is_run(path)
    assert yaml.safe_load((path / "config.yaml").read_text()) == yaml.safe_load(CONFIG)
    environment = json.loads((path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"] == torch.__version__
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["hardware"]["cores"] >= 1


def test_empty_folder_is_used(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG):
        pass
    assert is_run(tmp_path)


def test_existing_run_needs_resume_or_overwrite(tmp_path: Path) -> None:
    start(tmp_path / "run")
    before = listing(tmp_path)
    with pytest.raises(RunFolderError, match=r"already holds a run; continue it with --resume, replace it with --overwrite"):
        RunFolder.open(tmp_path / "run", CONFIG)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("option", [{}, {"resume": True}, {"overwrite": True}])
def test_foreign_folder_is_never_touched(tmp_path: Path, option: dict[str, bool]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "config.yaml").write_text("seed: 1\n")  # a config of something else
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(RunFolderError, match="not a run folder of srppo, so nothing in it is touched"):
        RunFolder.open(tmp_path, CONFIG, **option)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("kind", ["file", "dead link"])
def test_file_in_the_way(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run"
    path.write_text("x") if kind == "file" else path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.open(path, CONFIG)


def test_file_as_a_parent(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(RunFolderError, match=r"a part of this path is a file"):
        RunFolder.open(tmp_path / "a" / "run", CONFIG)


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="choose one"):
        RunFolder.open(tmp_path / "run", CONFIG, resume=True, overwrite=True)
    assert not (tmp_path / "run").exists()


def test_check_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    RunFolder.check(tmp_path / "new")
    start(tmp_path / "run")
    RunFolder.check(tmp_path / "run", resume=True)
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.check(tmp_path / "run")
    with pytest.raises(RunFolderError, match="seed: 0 in the folder, 5 now"):
        RunFolder.check(tmp_path / "run", resume=True, config_yaml=changed(seed=5))
    RunFolder.check(tmp_path / "run", resume=True, config_yaml=changed(seed=5), may_differ=("seed",))
    RunFolder.check(tmp_path / "new", resume=True, config_yaml=CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    start(tmp_path / "run")
    (tmp_path / "run" / "link").symlink_to(outside)
    with RunFolder.open(tmp_path / "run", changed(seed=5), overwrite=True) as run:
        assert not run.resumed
    assert sorted(listing(tmp_path / "run")) == ["config.yaml", "environment.json"]
    assert (outside / "kept.txt").read_text() == "kept"  # the link went, not what it points to


def test_resume_keeps_everything(tmp_path: Path) -> None:
    start(tmp_path / "run")
    before = listing(tmp_path / "run")
    with RunFolder.open(tmp_path / "run", CONFIG, resume=True) as run:
        assert run.resumed
    assert listing(tmp_path / "run") == before


def test_resume_of_nothing_begins(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", CONFIG, resume=True) as run:
        assert not run.resumed


def test_resume_lists_every_changed_key_and_changes_nothing(tmp_path: Path) -> None:
    start(tmp_path / "run")
    before = listing(tmp_path / "run")
    with pytest.raises(RunFolderError) as error:
        RunFolder.open(
            tmp_path / "run", changed(seed=5, ppo={"clip": 0.3, "micro_batch_tokens": 2}, data={"columns": {"prompt": "q"}}), resume=True
        )
    text = str(error.value)
    assert "ppo.clip: 0.2 in the folder, 0.3 now" in text
    assert "seed: 0 in the folder, 5 now" in text
    assert "data.columns.prompt: (not there) in the folder, q now" in text
    assert "micro_batch_tokens" not in text
    assert listing(tmp_path / "run") == before


def test_resume_with_harmless_changes_records_them(tmp_path: Path) -> None:
    start(tmp_path / "run")
    with RunFolder.open(tmp_path / "run", changed(threads=1, ppo={"micro_batch_tokens": 2, "keep_checkpoints": 9}), resume=True):
        pass
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["ppo"]["micro_batch_tokens"] == 2


def rewrite(folder: Path, change: Any) -> None:
    """Change the config.yaml of a run, as another version of srppo would have written it."""
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(f"{MARK}\n{yaml.safe_dump(values)}")


def test_runs_of_other_versions_can_be_resumed(tmp_path: Path) -> None:
    """A key that is newer than the run has its default; one that is gone does not count, nor does its section."""
    start(tmp_path / "run")

    def older(values: dict[str, Any]) -> None:
        del values["ppo"]["adam_epsilon"], values["rollout"]
        values["ppo"]["value_coef"] = 0.1
        values |= {"curriculum": {"steps": 3}, "fast": True}

    rewrite(tmp_path / "run", older)
    RunFolder.check(tmp_path / "run", resume=True, config_yaml=CONFIG)
    with pytest.raises(RunFolderError, match=r"ppo\.adam_epsilon: 1e-08 in the folder, 1e-05 now") as error:
        RunFolder.check(tmp_path / "run", resume=True, config_yaml=changed(ppo={"adam_epsilon": 1e-5}))
    assert "value_coef" not in str(error.value)
    told: list[str] = []
    assert load_run_config(tmp_path / "run", told.append, {"ppo.clip": 0.1}) == build({"ppo": {"clip": 0.1}})
    [warning] = told
    assert warning.endswith("keys that this one does not have are ignored: curriculum, fast, ppo.value_coef")


def test_values_that_are_no_longer_allowed_are_compared_as_they_stand(tmp_path: Path) -> None:
    start(tmp_path / "run")
    rewrite(tmp_path / "run", lambda values: values["ppo"].update(lr_schedule="stairs"))
    with pytest.raises(RunFolderError, match=r"ppo\.lr_schedule: stairs in the folder, constant now"):
        RunFolder.check(tmp_path / "run", resume=True, config_yaml=CONFIG)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    before = listing(run)
    for place, name in [("", ".sft.a1.part"), ("sft_checkpoints", ".share-1.b2.part"), ("checkpoints/ppo", ".checkpoint-3.partial")]:
        (run / place / name).mkdir(parents=True)
        (run / place / name / "model.safetensors").write_bytes(b"half")
    for name in (
        ".config.yaml.c3.tmp",
        "stages/.sft.json.d4.tmp",
        "evaluation/.base.jsonl.e5.tmp",
        "critic/.value_scale.json.f6.tmp",
        "plots/.kl.png.h8.tmp",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("half")
    (run / "vllm/srppo-i9/weights-1").mkdir(parents=True)  # handed to servers
    (run / ".policy.g7.old" / "old").mkdir(parents=True)  # the new policy is in place: this one is of no use
    with RunFolder.open(run, CONFIG, resume=True):
        pass
    assert listing(run) == before


def test_a_folder_that_was_moved_away_is_put_back(tmp_path: Path) -> None:
    """Killed between the two renames of models/saving.atomic_folder."""
    run = start(tmp_path / "run")
    before = listing(run)
    (run / ".policy.a1.old").mkdir()
    (run / "policy").rename(run / ".policy.a1.old" / "old")
    (run / ".policy.b2.part").mkdir()
    with RunFolder.existing(run):
        pass
    assert listing(run) == before and not list(run.glob(".policy*"))


def test_harmless_keys_exist() -> None:
    from srppo.config import valid_keys

    assert set(valid_keys()) >= HARMLESS


def test_caller_may_free_a_section(tmp_path: Path) -> None:
    start(tmp_path / "run")
    other = changed(evaluation={"samples": 8})
    with pytest.raises(RunFolderError, match=r"evaluation\.samples"):
        RunFolder.open(tmp_path / "run", other, resume=True)
    with RunFolder.open(tmp_path / "run", other, resume=True, may_differ=("evaluation",)) as run:
        assert run.resumed


def test_another_environment_on_resume_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path / "run")
    first = json.loads((tmp_path / "run" / "environment.json").read_text())
    for version in ("4.0", "5.0"):
        monkeypatch.setattr("srppo.run_folder.environment", lambda v=version: {"python": v})
        with RunFolder.open(tmp_path / "run", CONFIG, resume=True):
            pass
    assert json.loads((tmp_path / "run" / "environment.json").read_text()) == {"python": "5.0", "before_resume": [first, {"python": "4.0"}]}


def test_existing_opens_only_runs(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder.existing(tmp_path)
    start(tmp_path / "run")
    with RunFolder.existing(tmp_path / "run") as run:
        run.log({"stage": "sft", "step": 2})
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2


# --- the lock


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", CONFIG):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunFolderError, match=rf"in use by another run \(process {os.getpid()}\)"):
                RunFolder.open(tmp_path / "run", CONFIG, **options)
        assert is_run(tmp_path / "run")
    RunFolder.open(tmp_path / "run", CONFIG, resume=True).close()


def test_killed_process_leaves_no_stale_lock(tmp_path: Path) -> None:
    """SIGKILL in the middle of a run, a temporary file and half a line on disk: the next process resumes cleanly."""
    code = f"""
        import os, signal
        from srppo.config import build, dump
        from srppo.run_folder import RunFolder
        run = RunFolder.open({str(tmp_path / "run")!r}, dump(build({{}})))
        run.log({{"stage": "ppo", "iteration": 1}})
        open(run.path / "metrics.jsonl", "a").write('{{"stage": "ppo", "iter')
        open(run.path / ".summary.json.x1.tmp", "w").write("half")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == [{"stage": "ppo", "iteration": 1}]
    with RunFolder.open(tmp_path / "run", CONFIG, resume=True) as run:
        run.log({"stage": "ppo", "iteration": 2})
        assert run.metrics() == [{"stage": "ppo", "iteration": 1}, {"stage": "ppo", "iteration": 2}]
    assert not list((tmp_path / "run").glob("*.tmp")) and not list((tmp_path / "run").glob(".*.tmp"))
