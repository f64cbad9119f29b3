"""Killed by SIGKILL a few times, wherever it may be, a run ends as one that was not (`python -m benchmarks.crash` has the long version)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.crash_compare import fingerprint, without_clocks

from srppo.config import dump
from tiny_job import tiny_job

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_killed_runs_end_as_an_undisturbed_one(tmp_path: Path) -> None:
    small = {"diagnose__samples": 2, "diagnose__prompts": 2, "diagnose__preview": False, "diagnose__on_no_go": "warn", "guard__samples": 1}
    config = tiny_job(tmp_path, sft__steps=6, sft__checkpoint_every=1, ppo__iterations=2, guard__every=1, evaluation__samples=1, **small)
    recipe, result = tmp_path / "killed.yaml", tmp_path / "crash.json"
    recipe.write_text(dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.crash", "--kills", "6", "--recipe", str(recipe), "--output", str(result)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run([*command, "--work", str(tmp_path / "work")], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(result.read_text())
    assert told["kills"] == 6 and told["differences"] == 0 and len(told["by_phase"]) >= 4


def test_the_comparison_sees_a_bit_and_no_clock(tmp_path: Path) -> None:
    for name, seconds, weight, text in (
        ("one", 1.0, b"\0", "x"),
        ("other", 2.0, b"\0", "x"),
        ("odd", 1.0, b"\1", "x"),
        ("words", 1.0, b"\0", "y"),
    ):
        run = tmp_path / name
        (run / "policy").mkdir(parents=True)
        (run / "policy/model.safetensors").write_bytes(weight)
        record = {"loss": 1.0, "timing/step": seconds, "tokens_per_second": seconds, "said": text}
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        (run / "summary.json").write_text(json.dumps({"wall_seconds": seconds, "srppo": {"seconds": seconds, "n": 3}}))
    one, other, odd, words = (fingerprint(tmp_path / name) for name in ("one", "other", "odd", "words"))
    assert one == other
    assert {name for name in one if one[name] != odd[name]} == {"policy/model.safetensors"}
    assert {name for name in one if one[name] != words[name]} == {"metrics.jsonl"}
    assert without_clocks([{"memory/update": 1, "a": [{"seconds": 2, "b": 3}]}]) == [{"a": [{"b": 3}]}]
