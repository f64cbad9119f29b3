"""Keep what a finished run has to show: python benchmarks/keep_results.py runs/NAME docs/results/NAME

Copies configuration, environment, summary, metrics and plots (no model, no samples), and prints the table for its README.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

STAGES = {"base": "base", "sft": "SFT", "sft_continued": "continued SFT", "srppo": "SRPPO"}


def table(summary: dict) -> str:
    """Stages by groups as Markdown."""
    lines = ["| group | stage | sampled (95 % interval) | greedy | mean length | ends |", "|---|---|---|---|---|---|"]
    for group in summary["base"]:
        for stage, title in STAGES.items():
            if r := summary.get(stage, {}).get(group):
                sampled = f"{100 * r['sampled']:.1f} ({100 * r['sampled_low']:.1f} to {100 * r['sampled_high']:.1f})"
                ends = f"{100 * r['eos_rate']:.0f} %"
                lines.append(f"| {group} | {title} | {sampled} | {100 * r['greedy']:.1f} | {r['mean_length']:.1f} | {ends} |")
    return "\n".join(lines)


def main() -> None:
    run, target = map(Path, sys.argv[1:3])
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "summary.json", "metrics.jsonl", "environment.json"):
        shutil.copy(run / name, target / name)
    for plot in sorted((run / "plots").glob("*.png")):
        shutil.copy(plot, target / plot.name)
    print(table(json.loads((run / "summary.json").read_text())))


if __name__ == "__main__":
    main()
