"""Our side of the lab's race: python -m benchmarks.race.lab_ours JOB.json RESULT.json

`run_ppo` on the lab's recipe from a finished SFT, evaluated every few rounds; what evaluation costs is in no phase's time.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from srppo.config import build, merge
from srppo.job import run_ppo
from srppo.lab.world import recipe
from srppo.progress import make_progress


def lab_recipe(world: str, seed: int, output: Path, sft: str | None, rounds: int, every: int) -> dict[str, Any]:
    """The lab's recipe without card, guard, baseline and checkpoints on the way; evaluated on all of the world's evaluation rows."""
    changes = {
        "sft.checkpoint": sft,
        "ppo.iterations": rounds,
        "evaluation.every": every,
        "evaluation.during_prompts": 10**6,
        "evaluation.samples": 1,
        "evaluation.continued_sft": False,
        "diagnose.enabled": False,
        "guard.every": 0,
    }
    return merge(recipe(world, seed, output), changes)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    output = Path(job["work"]) / "run"
    shutil.rmtree(output, ignore_errors=True)
    # one round more, which is not counted: the last round of a run is evaluated as a stage of its own, not among the metrics
    values = lab_recipe(job["world"], job["seed"], output, job["sft"], job["rounds"] + 1, job["every"])
    run_ppo(build(values), progress=make_progress("quiet"))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds, curve, rounds = 0.0, [], []
    for row in rows:
        if row.get("stage") != "ppo" or row.get("iteration", job["rounds"] + 1) > job["rounds"]:
            continue
        spent = sum(row[f"timing/{phase}"] for phase in ("rollout", "score", "update"))
        seconds += spent
        rounds.append(spent)
        accuracy = {name.split("/")[1]: value for name, value in row.items() if name.startswith("eval/") and name.endswith("/sampled")}
        if accuracy:
            curve.append({"round": row["iteration"], "seconds": seconds, **accuracy})
    kl = [row["objective/kl"] for row in rows if "objective/kl" in row][: job["rounds"]]
    Path(sys.argv[2]).write_text(json.dumps({"system": "srppo", "curve": curve, "round_seconds": rounds, "kl": kl}))


if __name__ == "__main__":
    main()
