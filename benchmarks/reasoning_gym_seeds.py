"""The reasoning-gym recipe on several data seeds: what PPO adds to its SFT on a real model, pooled. One command:

python benchmarks/reasoning_gym_seeds.py --seeds 2 3 4 --runs runs/reasoning_gym_seeds

Needs what recipes/smollm2_reasoning_gym.yaml needs; about 35 minutes a seed on one core. Seeds 0, 1 and 101 were used to choose
settings. Writes benchmarks/results/reasoning_gym_seeds.json and docs/results/reasoning_gym_seeds.md; finished runs are taken from
their folders, interrupted ones go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from srppo.config import load_recipe
from srppo.job import align
from srppo.progress import make_progress

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/smollm2_reasoning_gym.yaml"


def run(seed: int, runs: Path) -> dict[str, Any]:
    """The summary of the recipe on the data of a seed."""
    folder, data = runs / f"seed-{seed}", runs / f"data-{seed}"
    if not (folder / "summary.json").is_file():
        if not (data / "evaluation.jsonl").is_file():
            prepare = [sys.executable, ROOT / "recipes/prepare_reasoning_gym.py", "--seed", str(seed), "--output", data]
            subprocess.run(prepare, check=True)
        files = {f"data.{name}": str(data / f"{name}.jsonl") for name in ("demonstrations", "prompts")}
        changes = {"seed": seed, "output": str(folder), "evaluation.prompts": str(data / "evaluation.jsonl"), **files}
        align(load_recipe(RECIPE, changes), resume=(folder / "config.yaml").is_file(), progress=make_progress("plain"))
    return json.loads((folder / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/reasoning_gym_seeds"))
    args = parser.parse_args()
    for seed in args.seeds:
        run(seed, args.runs)


if __name__ == "__main__":
    main()
