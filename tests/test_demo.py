"""The demo on the real embedded world, cut short: it learns, it stops and goes on, and its files stay beside the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srppo.generate import generate_text
from srppo.lab.demo import demo, verdict
from srppo.lab.world import base_folder
from srppo.progress import make_progress
from srppo.train.interrupt import Interrupt, Interrupted, StopRequested


class StopInPPO(Interrupt):
    left = 45

    def check(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise StopRequested


def run(output: Path, **options: Any) -> dict[str, Any]:
    short = {"ppo__iterations": 3, "evaluation__every": 0, "evaluation__max_prompts": 40, "evaluation__samples": 2}
    return demo(0, str(output), progress=make_progress("quiet"), **short, **options)


def test_stop_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srppo.workspace.Interrupt", StopInPPO)
    with pytest.raises(Interrupted):
        run(tmp_path / "demo")
    monkeypatch.setattr("srppo.workspace.Interrupt", Interrupt)
    summary = run(tmp_path / "demo", resume=True)
    assert (tmp_path / "demo-world/eval.jsonl").is_file()
    for stage in ("base", "sft", "sft_continued", "srppo"):
        assert set(summary[stage]) == {"with_demonstrations", "without_demonstrations"}
    base, sft = summary["base"]["with_demonstrations"], summary["sft"]["with_demonstrations"]
    assert sft["sampled"] > base["sampled"] + 0.3  # a light SFT already finds the right author
    assert len(verdict(summary)) == 4


def test_generate_fits_its_default_length_into_a_small_model() -> None:
    """The embedded model has 256 positions, fewer than a prompt and the default of 256 new tokens."""
    answers = generate_text(str(base_folder()), ["copy abc="], greedy=True)
    assert len(answers) == 1 and answers[0].ended
