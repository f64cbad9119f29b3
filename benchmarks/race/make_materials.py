"""Materials of a race, made in a process that gives its memory back: python -m benchmarks.race.make_materials JOB.json RESULT.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.race.materials import write_materials
from benchmarks.race.shapes import Shape


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    write_materials(
        Path(told["folder"]),
        Shape.of(told["shape"]),
        told["prompts"],
        tunings=told["tunings"],
        device=told["device"],
        dtype=told["dtype"],
    )
    Path(sys.argv[2]).write_text(json.dumps({"folder": told["folder"]}))


if __name__ == "__main__":
    main()
