"""A critic with a trunk of its own against a value head on the frozen SFT model's states, in the lab. One command:

python -m benchmarks.critic_head [--seeds 700 701 702 703 704]

Both start from the same SFT model and see the same prompts. Writes benchmarks/results/critic_head.json: sampled accuracy with and without
demonstrations, and the seconds of PPO's rounds by phase, a row a seed and critic.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.race.results import write

SETTINGS: dict[str, dict[str, Any]] = {
    "own": {},
    "head": {"tuning__critic": "head"},
    "head, ten times the rate": {"tuning__critic": "head", "ppo__critic_learning_rate": 3e-3},
}
FOLDER = Path("runs/critic_head")


def run(seed: int, name: str) -> dict[str, Any]:
    from srppo.lab.demo import demo
    from srppo.progress import make_progress

    own = FOLDER / f"{seed}" / "own"
    output = FOLDER / f"{seed}" / name.replace(", ", "-").replace(" ", "-")
    off = {"guard__every": 0, "diagnose__enabled": False, "evaluation__continued_sft": False, "evaluation__every": 0}
    changes = SETTINGS[name] | off | ({} if name == "own" else {"sft__checkpoint": str(own / "sft")})
    summary = demo(seed, str(output), overwrite=True, progress=make_progress("quiet"), **changes)
    rounds = [r for r in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if r.get("stage") == "ppo"]
    accuracy = {group: found["sampled"] for group, found in summary["srppo"].items()}
    seconds = {key: statistics.median(r[f"timing/{key}"] for r in rounds[1:]) for key in ("rollout", "score", "policy", "critic")}
    variance = rounds[-1]["critic/explained_variance"]
    return {"seed": seed, "critic": name, "accuracy": accuracy, "seconds": seconds, "explained_variance": variance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[700, 701, 702, 703, 704])
    rows = []
    for seed in parser.parse_args().seeds:
        for name in SETTINGS:
            rows.append(run(seed, name))
            print(json.dumps(rows[-1]), flush=True)
            write("critic_head", {"rows": rows}, {})


if __name__ == "__main__":
    main()
