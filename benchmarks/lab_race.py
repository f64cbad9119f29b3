"""Seconds to reach the SFT's accuracy + 10 points on tasks without demonstrations, in the embedded world: ours against TRL 1.12.0's
PPOTrainer. One command:

python -m benchmarks.lab_race [--seeds 500 501 502] [--rounds 40]

Both start from one SFT folder a seed, on the same prompts, with the settings of the lab's recipe, one thread, and are evaluated every
two rounds by the same function on the same words and random numbers, outside their clocks. Every setting was fixed before the first run.
Writes benchmarks/results/lab_race.json and docs/results/speed.md. Needs trl 1.12.0 (the dev extra).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.race import results
from benchmarks.race.job import ROOT, answer_of
from scipy.stats import t as student

NAME = "lab_race"
GAIN = 0.10  # sampled accuracy over the SFT's
EVERY = 2  # rounds between evaluations
GROUP = "without_demonstrations"


def reached(curve: Sequence[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The first evaluation at or above the target; None if there is none."""
    return next((point for point in curve if point[GROUP] >= target), None)


def geometric_interval(ratios: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """Geometric mean of positive ratios with Student's interval of their logarithms."""
    logs = [math.log(r) for r in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return {"mean": math.exp(mean)}
    half = float(student.ppf(0.5 + level / 2, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"mean": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def race(seed: int, rounds: int, work: Path) -> dict[str, Any]:
    """One seed: the SFT, then both sides."""
    world = str(work / f"world-{seed}")
    start = answer_of("lab_sft", {"world": world, "seed": seed, "work": str(work / f"sft-{seed}")}, work / f"sft-{seed}")
    target = start["accuracy"][GROUP] + GAIN
    out: dict[str, Any] = {"seed": seed, "sft": start["accuracy"], "target": target}
    for side in ("ours", "trl"):
        folder = work / f"{side}-{seed}"
        told = {"world": world, "seed": seed, "sft": start["sft"], "work": str(folder), "rounds": rounds, "every": EVERY, "target": target}
        said = answer_of(f"lab_{side}", told, folder)
        there = reached(said["curve"], target)
        out[side] = said | {"seconds_per_round": statistics.median(said["round_seconds"]), "reached": there}
        when = f"{there['seconds']:.1f} s, round {there['round']}" if there else f"not within {len(said['round_seconds'])} rounds"
        print(f"seed {seed}: {said['system']}: SFT {start['accuracy'][GROUP]:.3f} + {GAIN}: {when}", flush=True)
    return out


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios over the seeds on which both arrived, and how many did."""
    both = [row for row in rows if row["ours"]["reached"] and row["trl"]["reached"]]
    out: dict[str, Any] = {side: {"reached": sum(bool(row[side]["reached"]) for row in rows)} for side in ("ours", "trl")}
    out["seeds"] = len(rows)
    out["round_time_ratio"] = geometric_interval([row["trl"]["seconds_per_round"] / row["ours"]["seconds_per_round"] for row in rows])
    if both:
        out["time_ratio"] = geometric_interval([row["trl"]["reached"]["seconds"] / row["ours"]["reached"]["seconds"] for row in both])
        for side in ("ours", "trl"):
            out[side] |= {key: statistics.fmean(row[side]["reached"][key] for row in both) for key in ("seconds", "round")}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[500, 501, 502])
    parser.add_argument("--rounds", type=int, default=40, help="at most")
    parser.add_argument("--work", type=results.place, default=ROOT / "runs" / NAME)
    parser.add_argument("--results", type=results.place, default=results.FOLDER)
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        load = results.load_average()
        rows.append({"load_average_before": load, **race(seed, args.rounds, args.work)})
        results.write(NAME, {"gain": GAIN, "every": EVERY, "summary": summary(rows), "rows": rows}, {"trl": "1.12.0"}, args.results)
    results.write_page(args.results)


if __name__ == "__main__":
    main()
