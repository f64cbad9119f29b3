"""The SFT model both sides of the lab's race start from: python -m benchmarks.race.lab_sft JOB.json RESULT.json"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from benchmarks.race.lab_ours import lab_recipe

from srppo.config import build
from srppo.job import run_sft
from srppo.lab.world import write_world
from srppo.progress import make_progress


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    output = Path(job["work"]) / "run"
    shutil.rmtree(output, ignore_errors=True)
    write_world(job["world"], job["seed"])
    values = lab_recipe(job["world"], job["seed"], output, None, 0, 0)
    summary = run_sft(build(values), progress=make_progress("quiet"))
    accuracy = {name: group["sampled"] for name, group in summary["sft"].items()}
    Path(sys.argv[2]).write_text(json.dumps({"sft": str(output / "sft"), "accuracy": accuracy}))


if __name__ == "__main__":
    main()
