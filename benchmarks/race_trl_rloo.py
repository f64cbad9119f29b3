"""Critic-free PPO against today's TRL's RLOOTrainer, side by side on this machine. One command:

python -m benchmarks.race_trl_rloo [--shapes default smollm2] [--tunings full lora] [--updates 4] [--turns 2] [--quick]

Ours with ppo.baseline: group, both with four samples a prompt and the log-ratio as reward; otherwise as benchmarks.race_trl_ppo.
Writes benchmarks/results/race_trl_rloo.json and docs/results/speed.md. TRL 1.16.0 lies beside the environment's own TRL: where
build/trl-1.16.0 is missing, it is installed there by pip install --no-deps --target.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.race import sides
from benchmarks.race.job import ROOT

NAME = "race_trl_rloo"
TRL = "1.16.0"
SAMPLES = 4


def other_trl(folder: Path | None = None) -> Path:
    """The folder with TRL 1.16.0, installed now if it is not there. Raises SystemExit with what to do where that fails."""
    folder = folder or ROOT / "build" / f"trl-{TRL}"
    if not (folder / "trl" / "__init__.py").is_file():
        print(f"installing trl {TRL} into {folder}, once", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"trl=={TRL}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"trl {TRL} could not be installed into {folder}:\n{done.stderr[-1500:]}\n"
                f"With a package index at hand run: pip install --no-deps --target {folder} trl=={TRL}"
            )
    return folder


def main() -> None:
    args = sides.options(__doc__, NAME)
    peers = {kind: sides.Peer("trl_rloo", (kind,), str(other_trl())) for kind in ("full", "lora")}
    sides.race_all(NAME, args, peers, samples=SAMPLES, packages={"trl": TRL})


if __name__ == "__main__":
    main()
