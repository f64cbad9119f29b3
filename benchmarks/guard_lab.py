"""Does the guard keep PPO from ending below the SFT, and what does it cost where PPO helps? In the lab, five seeds. One command:

    python benchmarks/guard_lab.py                     what docs/results/guard.md shows; finished runs are taken from their folders
    python benchmarks/guard_lab.py --seeds 500 501     other seeds: their results and page go into the runs' folder

Two settings, each with the guard (its defaults) and without: the over-optimised one (heavy SFT, beta 0.3) and the demo's (light SFT,
beta 1). Writes benchmarks/results/guard_lab.json and docs/results/guard.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from srppo.config import build, merge
from srppo.files import read_lines
from srppo.intervals import bootstrap_interval
from srppo.job import align
from srppo.lab.world import recipe, write_world
from srppo.progress import make_progress
from srppo.train.guard import Look, alarming

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (300, 301, 302, 303, 304)
SETTINGS: dict[str, tuple[Literal["light", "heavy"], float]] = {"over-optimised": ("heavy", 0.3), "the demo's": ("light", 1.0)}
GROUPS = {"with_demonstrations": "with", "without_demonstrations": "without"}


def run(seed: int, name: str, guarded: bool, runs: Path) -> dict[str, Any]:
    strength, beta = SETTINGS[name]
    world, folder = runs / f"world-{seed}", runs / f"{seed}-{strength}-{'guard' if guarded else 'none'}"
    if not (folder / "summary.json").is_file():
        if not (world / "eval.jsonl").is_file():
            write_world(world, seed)
        changes = {
            "reward.kl_coef": beta,
            "diagnose.enabled": False,
            "evaluation.every": 0,
            "evaluation.samples": 2,
            "evaluation.continued_sft": False,
            **({"guard.keep": "best", "guard.stop": True} if guarded else {"guard.every": 0}),
        }
        config = build(merge(recipe(world, seed, folder, strength), changes))
        align(config, overwrite=folder.exists(), progress=make_progress("quiet"))
    summary = json.loads((folder / "summary.json").read_text())
    alarm = alarm_round([r for r in read_lines(folder / "metrics.jsonl") if "guard/criterion" in r])
    return {
        "seed": seed,
        "setting": name,
        "guard": guarded,
        "sft": {g: summary["sft"][g]["sampled"] for g in GROUPS},
        "srppo": {g: summary["srppo"][g]["sampled"] for g in GROUPS},
        "lengths": {g: [summary[s][g]["mean_length"] for s in ("sft", "srppo")] for g in GROUPS},
        "gain": {g: summary["srppo_gain"]["sft"][g] for g in GROUPS},
        "ppo": {k: summary["ppo_training"].get(k) for k in ("kept_round", "rounds", "stopped_early")},
        "alarm": alarm,
        "seconds": summary["wall_seconds"],
    }


def alarm_round(records: list[dict[str, Any]]) -> int | None:
    """The round of the first alarm, by the rule as it is now: it changes nothing in a run."""
    nan = dict.fromkeys(("heldout_nll", "heldout_nll_response", "match", "kl", "length", "entropy", "eos_rate"), float("nan"))
    looks = [
        Look(r.get("iteration", 0), r["guard/reward"], r.get("guard/auc"), heldout_probability=r["guard/criterion"], **nan) for r in records
    ]
    return next((look.round for i, look in enumerate(looks) if alarming(looks[: i + 1])), None)


def percent(values: list[float]) -> str:
    low, high = bootstrap_interval(values)
    return f"{100 * np.mean(values):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def page(rows: list[dict[str, Any]]) -> str:
    seeds, seconds = sorted({r["seed"] for r in rows}), np.mean([r["seconds"] for r in rows])
    lines = [
        "# The guard during PPO",
        "",
        f"`python benchmarks/guard_lab.py --seeds {' '.join(map(str, seeds))}`: the embedded world, sampled accuracy in percent,",
        f"mean and 95 % bootstrap interval over {len(seeds)} seeds; 25 rounds at most, {seconds:.0f} s a run with one thread.",
        "",
        "| setting | guard | SFT with / without | PPO with | PPO without | length with / without | change without, per seed "
        "| kept round, per seed | rounds run | alarm at round |",
        "|" + "---|" * 10,
    ]
    for name, (strength, beta) in SETTINGS.items():
        for guarded in (False, True):
            own = sorted((r for r in rows if r["setting"] == name and r["guard"] == guarded), key=lambda r: r["seed"])
            if not own:
                continue
            before = " / ".join(f"{100 * np.mean([r['sft'][g] for r in own]):.1f}" for g in GROUPS)
            after = " | ".join(percent([r["srppo"][g] for r in own]) for g in GROUPS)
            changes = ", ".join(f"{100 * r['gain']['without_demonstrations']['gain']:+.1f}" for r in own)
            kept = ", ".join(str(r["ppo"]["kept_round"]) for r in own) if guarded else "last"
            ran = ", ".join(str(r["ppo"]["rounds"]) for r in own) if guarded else "25"
            alarm = ", ".join(str(r["alarm"] or "none") for r in own) if guarded else "–"
            lengths = " / ".join(" → ".join(f"{x:.1f}" for x in np.mean([r["lengths"][g] for r in own], 0)) for g in GROUPS)
            cells = [f"{name}: {strength} SFT, β = {beta:g}", "on" if guarded else "off", before, after, lengths, changes, kept, ran, alarm]
            lines.append(f"| {' | '.join(cells)} |".replace(" -", " −"))
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--runs", type=Path, default=Path("runs/guard_lab"))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    own = tuple(options.seeds) != SEEDS  # then the committed results are left as they are
    results = (options.runs if own else ROOT / "benchmarks/results") / "guard_lab.json"
    shown = (options.runs if own else ROOT / "docs/results") / "guard.md"
    rows = []
    for seed in options.seeds:
        for name in SETTINGS:
            for guarded in (True, False):
                rows.append(run(seed, name, guarded, options.runs))
                print(json.dumps(rows[-1]), flush=True)
        results.write_text(json.dumps(rows, indent=1) + "\n")
        shown.write_text(page(rows))
    print(f"{shown} is written")


if __name__ == "__main__":
    main()
