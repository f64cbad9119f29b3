"""Is the reward card right? Over SFT strengths, demonstration counts and betas in the lab: its prediction, and what PPO then did.

    python benchmarks/card_grid.py                     what docs/results/card_grid.md shows; finished runs are not run again
    python benchmarks/card_grid.py --seeds 500 501     other seeds: their results and page go into the runs' folder
    python benchmarks/card_grid.py --cards             make the cards anew (their SFTs are kept), after a change of what they measure
    python benchmarks/card_grid.py --page              only the page, from the result file

For each world (seed, count) and SFT strength: SFT and card; then PPO at each beta and at the card's own, guard off, judged by exact
answers. A line a PPO run in card_grid.jsonl, in order of finishing; several processes may share the work (--part I/N).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from card_grid_page import write_page
from srppo.config import build, merge
from srppo.files import read_lines, write_lines
from srppo.job import align, run_diagnose
from srppo.lab.world import recipe, write_world
from srppo.progress import make_progress
from srppo.run_config import load_run_config
from srppo.sections import DiagnoseConfig

ROOT = Path(__file__).resolve().parent.parent
STRENGTHS: dict[str, dict[str, Any]] = {
    "light": {"sft.steps": 15, "sft.learning_rate": 1e-4},
    "medium": {"sft.steps": 60, "sft.learning_rate": 1e-4},
    "heavy": {"sft.steps": 60, "sft.learning_rate": 3e-4},
}
COUNTS = (16, 64, 256)  # demonstrations to train on; 16 more are held out
SEEDS = {200: (0.5, 1.0), 201: (0.5, 1.0), 202: (0.5, 1.0), 203: (0.5, 1.0), 204: (0.3, 1.0), 205: (0.3, 1.0)}  # betas
ROUNDS = 15
GROUPS = ("with_demonstrations", "without_demonstrations")


Case = tuple[int, int, str, float]


def finished(results: Path) -> dict[Case, dict[str, Any]]:
    rows = read_lines(results) if results.is_file() else []
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


def card_of(seed: int, count: int, strength: str, runs: Path, again: bool = False) -> dict[str, Any]:
    """The card of one SFT, made once unless asked for again; the SFT model stays in its folder/sft."""
    folder = runs / f"card-{seed}-{count}-{strength}"
    file = folder / "diagnose.json"
    if file.is_file() and not again:
        return json.loads(file.read_text())
    begun = (folder / "config.yaml").is_file()
    auto = {"reward.kl_coef": "auto", "diagnose.preview": False}
    fresh = merge(settings(world(seed, count, runs), seed, folder, strength), auto)
    config = load_run_config(folder, print) if begun else build(fresh)
    return run_diagnose(config, resume=begun, progress=make_progress("quiet"))


def world(seed: int, count: int, runs: Path) -> Path:
    folder = runs / f"world-{seed}-{count}"
    if not (folder / "eval.jsonl").is_file():
        write_world(folder, seed, demonstrations=count, eval_per_family=30)
    return folder


def card_figures(card: dict[str, Any]) -> dict[str, Any]:
    """What a row keeps of the card."""
    auc = next(p for p in card["preferences"] if p["against"] == "sft" and p["bucket"] == "all")["auc"]
    kept = {"rows": card["betas"], "spreads": card["spreads"], "length_bias": card["length_bias"], "auc": auc}
    return kept | {"suggested_beta": card["decision"]["beta"]}


def run(seed: int, count: int, strength: str, beta: float, runs: Path) -> dict[str, Any]:
    card = card_of(seed, count, strength, runs)
    folder = runs / f"ppo-{seed}-{count}-{strength}-{beta:g}"
    changes = {"sft.checkpoint": str(runs / f"card-{seed}-{count}-{strength}/sft"), "reward.kl_coef": beta, "diagnose.enabled": False}
    config = build(merge(settings(world(seed, count, runs), seed, folder, strength), changes))
    summary = align(config, overwrite=folder.exists(), progress=make_progress("quiet"))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    sft, srppo = summary["sft"], summary["srppo"]
    return {
        "seed": seed,
        "demonstrations": count,
        "strength": strength,
        "beta": beta,
        **card_figures(card),
        "sft": {g: sft[g]["sampled"] for g in GROUPS},
        "srppo": {g: srppo[g]["sampled"] for g in GROUPS},
        "length": {g: [sft[g]["mean_length"], srppo[g]["mean_length"]] for g in GROUPS},
        "gain": {g: summary["srppo_gain"]["sft"][g] for g in GROUPS},
        "heldout_nll": {s: summary["heldout_nll"][s] for s in ("sft", "srppo")},
        "seconds": summary["wall_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--demonstrations", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--strengths", nargs="+", choices=list(STRENGTHS), default=list(STRENGTHS))
    parser.add_argument(
        "--betas", type=float, nargs="+", default=None, help=f"of diagnose.betas; {SEEDS[204]} by default, and the card's own"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/card_grid"))
    parser.add_argument("--part", default="1/1", help="I/N: this process's share of the cards")
    parser.add_argument("--cards", action="store_true", help="make the cards anew and rewrite what the rows keep of them")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    options = parser.parse_args()
    if unknown := set(options.betas or []) - set(DiagnoseConfig().betas):
        parser.error(f"--betas {' '.join(f'{b:g}' for b in sorted(unknown))}: the card foretells only {DiagnoseConfig().betas}")
    own = not set(options.seeds) <= set(SEEDS)  # then the committed results are left as they are
    results = (options.runs if own else ROOT / "benchmarks/results") / "card_grid.jsonl"
    page = (options.runs if own else ROOT / "docs/results") / "card_grid.md"
    options.runs.mkdir(parents=True, exist_ok=True)
    part, _, parts = (int(x) if x.isdigit() else x for x in options.part.partition("/"))
    if not (isinstance(part, int) and isinstance(parts, int) and 1 <= part <= parts):
        parser.error(f"--part {options.part}: give I/N, with I from 1 to N")
    worlds = [(seed, count, strength) for seed in options.seeds for count in options.demonstrations for strength in options.strengths]
    if options.cards:
        rewrite(results, worlds, options.runs)
    for i, case in enumerate([] if options.page or options.cards else worlds[part - 1 :: parts]):
        suggested = card_of(*case, options.runs)["decision"]["beta"]
        for beta in sorted({*(options.betas or SEEDS.get(case[0], SEEDS[204])), suggested}):
            if (*case, beta) in finished(results):
                continue
            row = run(*case, beta, options.runs)
            with results.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(row) + "\n")
            gains = ", ".join(f"{100 * row['gain'][g]['gain']:+.1f}" for g in GROUPS)
            print(f"{i + 1} {case}, beta {beta:g} (the card's: {suggested:g}): PPO {gains} points, {row['seconds']:.0f} s", flush=True)
    write_page(list(finished(results).values()), page)
    print(f"{page} is written")


def rewrite(results: Path, worlds: list[tuple[int, int, str]], runs: Path) -> None:
    """Make these cards anew, and replace what the rows keep of them."""
    figures = {}
    for world in worlds:
        figures[world] = card_figures(card_of(*world, runs, again=True))
        print(f"{world}: beta {figures[world]['suggested_beta']:g}", flush=True)
    rows = [row | figures.get(case[:3], {}) for case, row in finished(results).items()]
    write_lines(results, rows)


if __name__ == "__main__":
    main()
