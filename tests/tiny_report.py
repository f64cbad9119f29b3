"""A run folder by hand, for reports: four stages, two groups, answers and rounds; and its page as text."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from srppo.config import build, dump
from srppo.report.page import render
from srppo.report.record import read_run
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
