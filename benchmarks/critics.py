"""A critic with a trunk of its own, trained by gradient steps, against one fitted by least squares, in the lab. One command:

python -m benchmarks.critics [--seeds 810 811 812 813 814]

In full and in LoRA tuning; both critics start from the same SFT model and see the same prompts. Writes benchmarks/results/critics.json:
what PPO maximises (objective/rlhf_reward, last eight rounds), sampled accuracy with and without demonstrations, the critic's explained
variance, and the seconds of PPO's rounds by phase, a row a seed, tuning and critic; and their means with paired differences.
Runs that are finished are not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.race.results import write

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {  # rates chosen for the evidence suite
        "tuning__kind": "lora",
        "sft__steps": 15,
        "sft__learning_rate": 5e-4,
        "ppo__learning_rate": 1e-3,
        "ppo__critic_learning_rate": 1e-3,
    },
}
CRITICS = ("own", "least_squares")
FOLDER = Path("runs/critics")
QUIET = {"guard__every": 0, "diagnose__enabled": False, "evaluation__continued_sft": False, "evaluation__every": 0}
Row = dict[str, Any]


def run(seed: int, tuning: str, critic: str) -> Row:
    from srppo.lab.demo import demo
    from srppo.progress import make_progress

    first, output = (FOLDER / f"{seed}" / f"{tuning}-{name}" for name in ("own", critic))
    start = {} if critic == "own" else {"sft__checkpoint": str(first / "sft")}
    changes = TUNINGS[tuning] | QUIET | start | {"tuning__critic": critic}
    if not (output / "summary.json").exists():
        demo(seed, str(output), overwrite=True, progress=make_progress("quiet"), **changes)
    summary = json.loads((output / "summary.json").read_text())
    rounds = [r for r in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if r.get("stage") == "ppo"]
    seconds = {key: statistics.median(r[f"timing/{key}"] for r in rounds[1:]) for key in ("rollout", "score", "policy", "critic")}
    return {
        "seed": seed,
        "tuning": tuning,
        "critic": critic,
        "objective": statistics.fmean(r["objective/rlhf_reward"] for r in rounds[-8:]),
        "accuracy": {group: found["sampled"] for group, found in summary["srppo"].items()},
        "seconds": seconds,
        "explained_variance": statistics.fmean(r["critic/explained_variance"] for r in rounds[1:]),
    }


def differences(rows: list[Row]) -> list[Row]:
    """For each tuning and figure the means, and least squares minus own with Student's 95 % half-width over the seeds."""
    from scipy.stats import t

    figures: dict[str, Callable[[Row], float]] = {
        "objective/rlhf_reward, last 8 rounds, nats": lambda r: r["objective"],
        "accuracy with demonstrations, %": lambda r: 100 * r["accuracy"]["with_demonstrations"],
        "accuracy without demonstrations, %": lambda r: 100 * r["accuracy"]["without_demonstrations"],
        "explained variance": lambda r: r["explained_variance"],
        "critic, seconds a round": lambda r: r["seconds"]["critic"],
    }
    out = []
    for tuning in TUNINGS:
        own, fitted = ([r for r in rows if (r["tuning"], r["critic"]) == (tuning, c)] for c in CRITICS)
        for name, figure in figures.items():
            changes = [figure(b) - figure(a) for a, b in zip(own, fitted)]
            means = dict(zip(CRITICS, (statistics.fmean(map(figure, side)) for side in (own, fitted))))
            half = float(t.ppf(0.975, len(changes) - 1)) * statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else math.nan
            out.append({"tuning": tuning, "figure": name, **means, "difference": statistics.fmean(changes), "half_width": half})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[810, 811, 812, 813, 814])
    rows: list[Row] = []
    for seed in parser.parse_args().seeds:
        for tuning in TUNINGS:
            for critic in CRITICS:
                rows.append(run(seed, tuning, critic))
                print(json.dumps(rows[-1]), flush=True)
        write("critics", {"rows": rows, "differences": differences(rows)}, {})
    for line in differences(rows):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
