"""Is the reward card right? Over SFT strengths, demonstration counts and betas in the lab: its prediction, and what PPO then did.

python benchmarks/card_grid.py --seeds 200 201 202 203 --runs runs/card_grid

For each world (seed, count) and SFT strength: SFT and card, made without looking at any answer; then PPO at each beta, guard off,
judged by exact answers. A line a PPO run in benchmarks/results/card_grid.jsonl, in order of finishing; finished ones are not run
again, and several processes may share the work (--part I/N). `python benchmarks/card_grid.py --page` writes
docs/results/card_grid.md from that file.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from srppo.config import build, merge
from srppo.job import align, run_diagnose
from srppo.lab.world import recipe, write_world
from srppo.progress import make_progress

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/card_grid.jsonl"
STRENGTHS: dict[str, dict[str, Any]] = {
    "light": {"sft.steps": 15, "sft.learning_rate": 1e-4},
    "medium": {"sft.steps": 60, "sft.learning_rate": 1e-4},
    "heavy": {"sft.steps": 60, "sft.learning_rate": 3e-4},
}
COUNTS = (16, 64, 256)  # demonstrations to train on; 16 more are held out
BETAS = (0.3, 0.5, 1.0, 2.0)
ROUNDS = 15
GROUPS = ("with_demonstrations", "without_demonstrations")


def grid(seeds: list[int], counts: list[int], strengths: list[str], betas: list[float]) -> list[tuple[int, int, str, float]]:
    return [(seed, count, strength, beta) for seed in seeds for count in counts for strength in strengths for beta in betas]


def finished() -> dict[tuple[int, int, str, float], dict[str, Any]]:
    if not RESULTS.is_file():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {(r["seed"], r["demonstrations"], r["strength"], r["beta"]): r for r in rows}


def settings(world: Path, seed: int, output: Path, strength: str) -> dict[str, Any]:
    common = {
        **STRENGTHS[strength],
        "sft.checkpoints_at": [1.0],
        "reward.checkpoint": "sft",
        "ppo.iterations": ROUNDS,
        "guard.every": 0,
        "evaluation.every": 0,
        "evaluation.samples": 2,
        "evaluation.continued_sft": False,
    }
    return merge(recipe(world, seed, output), common)


def card_of(world: Path, folder: Path, seed: int, strength: str) -> dict[str, Any]:
    """The card of one SFT, made once; its SFT model stays in folder/sft."""
    file = folder / "diagnose.json"
    if file.is_file():
        return json.loads(file.read_text())
    config = build(merge(settings(world, seed, folder, strength), {"reward.kl_coef": "auto", "diagnose.preview": False}))
    return run_diagnose(config, overwrite=folder.exists(), progress=make_progress("quiet"))


def run(seed: int, count: int, strength: str, beta: float, runs: Path) -> dict[str, Any]:
    world = runs / f"world-{seed}-{count}"
    if not (world / "eval.jsonl").is_file():
        write_world(world, seed, demonstrations=count, eval_per_family=30)
    card = card_of(world, runs / f"card-{seed}-{count}-{strength}", seed, strength)
    folder = runs / f"ppo-{seed}-{count}-{strength}-{beta:g}"
    changes = {"sft.checkpoint": str(runs / f"card-{seed}-{count}-{strength}/sft"), "reward.kl_coef": beta, "diagnose.enabled": False}
    config = build(merge(settings(world, seed, folder, strength), changes))
    summary = align(config, overwrite=folder.exists(), progress=make_progress("quiet"))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    sft, srppo = summary["sft"], summary["srppo"]
    auc = next(p for p in card["preferences"] if p["against"] == "sft" and p["bucket"] == "all")["auc"]
    return {
        "seed": seed,
        "demonstrations": count,
        "strength": strength,
        "beta": beta,
        "verdict": card["verdict"],
        "reasons": card["reasons"],
        "suggested_beta": card["decision"]["beta"],
        "auc": auc,
        "rows": card["betas"],
        "spreads": card["spreads"],
        "length_bias": card["length_bias"],
        "sft": {g: sft[g]["sampled"] for g in GROUPS},
        "srppo": {g: srppo[g]["sampled"] for g in GROUPS},
        "length": {g: [sft[g]["mean_length"], srppo[g]["mean_length"]] for g in GROUPS},
        "gain": {g: summary["srppo_gain"]["sft"][g] for g in GROUPS},
        "heldout_nll": {s: summary["heldout_nll"][s] for s in ("sft", "srppo")},
        "seconds": summary["wall_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202, 203])
    parser.add_argument("--demonstrations", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--strengths", nargs="+", choices=list(STRENGTHS), default=list(STRENGTHS))
    parser.add_argument("--betas", type=float, nargs="+", default=list(BETAS))
    parser.add_argument("--runs", type=Path, default=Path("runs/card_grid"))
    parser.add_argument("--part", default="1/1", help="I/N: this process's share of the worlds")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    options = parser.parse_args()
    if options.page:
        from card_grid_page import write_page

        write_page(list(finished().values()))
        return
    part, parts = map(int, options.part.split("/"))
    cases = grid(options.seeds, options.demonstrations, options.strengths, options.betas)
    worlds = list(dict.fromkeys(c[:3] for c in cases))
    mine = [c for c in cases if worlds.index(c[:3]) % parts == part - 1]
    options.runs.mkdir(parents=True, exist_ok=True)
    for i, case in enumerate(mine):
        if case in finished():
            continue
        row = run(*case, options.runs)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        gains = ", ".join(f"{100 * row['gain'][g]['gain']:+.1f}" for g in GROUPS)
        card = f"{row['verdict']}, beta {row['suggested_beta']:g}"
        print(f"{i + 1}/{len(mine)} {case}: {card}; PPO {gains} points, {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
