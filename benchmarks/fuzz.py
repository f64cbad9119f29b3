"""Long fuzzing of everything srppo reads: `python -m benchmarks.fuzz --minutes 5`. Random examples, anew each time, until the time is over.

The tests are those of tests/test_fuzz_*.py, with ten times as many examples a turn. What fails is printed with the lines that make it
happen again, and ends the run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--times", type=int, default=10, help="examples a turn, against the test suite's")
    parser.add_argument("--only", default="", help="a part of the names of the files: config, data, run_folder, models")
    given = parser.parse_args()
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_fuzz_*.py") if given.only in p.name)
    environment = {
        **os.environ,
        "SRPPO_FUZZ": str(given.times),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    end, turns = time.monotonic() + 60 * given.minutes, 0
    while turns == 0 or time.monotonic() < end:
        for file in files:
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file], cwd=ROOT, env=environment, check=False
            )
            print(f"{Path(file).name}: turn {turns + 1}, {time.monotonic() - began:.0f} s", flush=True)
            if done.returncode:
                sys.exit(done.returncode)
        turns += 1


if __name__ == "__main__":
    main()
