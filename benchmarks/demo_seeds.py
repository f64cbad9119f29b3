"""The demo over several seeds: sampled and greedy accuracy of every stage, paired gains, cost. One command:

python benchmarks/demo_seeds.py --seeds 0 1 2 3 4 --runs runs/demo_seeds

Writes benchmarks/results/demo_seeds.json and docs/results/demo.md. Finished seeds are taken from their run folders.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

from srppo.environment import hardware
from srppo.lab.demo import demo
from srppo.progress import make_progress

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"base": "base", "sft": "SFT", "sft_continued": "continued SFT", "srppo": "SRPPO"}
GROUPS = ("with_demonstrations", "without_demonstrations")


def summary_of(seed: int, folder: Path) -> dict[str, Any]:
    """The summary of a finished run, or of a run now."""
    file = folder / "summary.json"
    if file.is_file():
        return json.loads(file.read_text())
    return demo(seed, str(folder), overwrite=folder.exists(), progress=make_progress("quiet"))


def interval(values: list[float]) -> str:
    """Mean over seeds and, of more than one, its standard deviation, in points."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def page(summaries: dict[int, dict[str, Any]], result: dict[str, Any]) -> str:
    lines = [
        "# The demo over seeds",
        "",
        "`python benchmarks/demo_seeds.py --seeds " + " ".join(map(str, summaries)) + "` — sampled accuracy at temperature 1 and greedy",
        "accuracy in percent, mean ± standard deviation over seeds (each draws its own demonstrations, prompts and evaluation words;",
        "the pretrained base is the same). Settings were chosen on seeds 100 and above.",
        "",
    ]
    for group in GROUPS:
        n = summaries[next(iter(summaries))]["base"][group]["n"]
        lines += [
            f"## Families {group.replace('_', ' ')} ({n} prompts a seed)",
            "",
            "| stage | sampled | greedy | mean length | per seed, sampled |",
        ]
        lines += ["|---|---|---|---|---|"]
        for stage, title in STAGES.items():
            cells = [s[stage][group] for s in summaries.values()]
            each = ", ".join(f"{100 * c['sampled']:.1f}" for c in cells)
            length = statistics.fmean(c["mean_length"] for c in cells)
            sampled, greedy = (interval([c[kind] for c in cells]) for kind in ("sampled", "greedy"))
            lines.append(f"| {title} | {sampled} | {greedy} | {length:.1f} | {each} |")
        for rival in ("sft", "sft_continued"):
            gains = [s["srppo_gain"][rival][group] for s in summaries.values()]
            each = ", ".join(f"{100 * g['gain']:+.1f} ({100 * g['low']:+.1f} to {100 * g['high']:+.1f})" for g in gains)
            lines += ["", f"SRPPO over {STAGES[rival]}, points, paired over prompts, 95 % interval within each seed: {each}."]
        lines.append("")
    seconds = [s["wall_seconds"] for s in summaries.values()]
    memory = max(s["peak_rss_mb"] for s in summaries.values())
    lines += [
        f"Each run took {min(seconds):.0f} to {max(seconds):.0f} s with one thread and at most {memory:.0f} MiB ({result['date']}).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_seeds"))
    args = parser.parse_args()
    summaries = {}
    for seed in args.seeds:
        summaries[seed] = summary_of(seed, args.runs / f"seed-{seed}")
        print(f"seed {seed}: {summaries[seed]['srppo_gain']['sft']}", flush=True)
    result = {"date": datetime.date.today().isoformat(), "hardware": hardware(), "seeds": summaries}
    (ROOT / "benchmarks/results").mkdir(parents=True, exist_ok=True)
    (ROOT / "docs/results").mkdir(parents=True, exist_ok=True)
    (ROOT / "benchmarks/results/demo_seeds.json").write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs/results/demo.md").write_text(page(summaries, result))


if __name__ == "__main__":
    main()
