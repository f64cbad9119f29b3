"""`srppo diagnose --json`: one JSON object on standard output whatever a scorer prints; and what goes with a run folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from srppo.cli import cli
from srppo.config import build, dump
from srppo.run_folder import RunFolder
from tiny_job import tiny_job

NOISY = """
def score(completion, row):
    print("scoring", completion)
    return 0.5
"""


def test_nothing_but_ascii_json_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noisy_scorer.py").write_text(NOISY)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny_job(
        tmp_path,
        evaluation__scorer="noisy_scorer:score",
        diagnose__samples=2,
        diagnose__prompts=2,
        diagnose__betas=[1.0],
        diagnose__preview=False,
    )
    rows = [{"prompt": f"día {i}:", "completion": f" é{i}"} for i in range(20)]
    Path(config.data.demonstrations).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(dump(config))
    result = CliRunner().invoke(cli, ["diagnose", str(tmp_path / "recipe.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert result.stdout.isascii() and any("é" in "".join(m["prompt"]) or "í" in m["prompt"] for m in card["maps"])
    assert "scoring" in result.stderr


@pytest.mark.parametrize(("option", "said"), [(["--output", "new"], "--output does not go"), (["--overwrite"], "--overwrite does not go")])
def test_a_run_folder_takes_neither_output_nor_overwrite(option: list[str], said: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    RunFolder.open(run, dump(build({"model": {"name": "m"}, "data": {"demonstrations": "d"}, "output": str(run)}))).close()
    (run / "stages").mkdir()
    (run / "stages/sft.json").write_text("{}")
    result = CliRunner().invoke(cli, ["diagnose", str(run), *option])
    assert result.exit_code == 2 and said in result.output and (run / "stages/sft.json").is_file()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    done = subprocess.run(f"{sys.executable} -m srppo --version {closed}", shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr
