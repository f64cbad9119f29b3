"""What each option of speed and memory does to a PPO round, one at a time, on one shape. One command:

python -m benchmarks.options [--shape default] [--updates 3]

Each run is a process of its own, with the plain run before and after them all. Writes benchmarks/results/options.json and the table in
docs/speed.md. One thread on a CPU; `python -m benchmarks.gpu` is for GPUs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.race import compare, results
from benchmarks.race.job import ROOT, Job, run_side
from benchmarks.race.materials import write_materials
from benchmarks.race.ours import OPTIONS
from benchmarks.race.shapes import SHAPES

RUNS = {
    "full": ["", "compile", "tokens512", "least_squares", "checkpointing", "frozen16", "autocast", "recompute", "entropy", ""],
    "lora": ["", "compile", "least_squares", "apart"],
}
PAGE = ROOT / "docs" / "speed.md"
START, END = "<!-- options: written by python -m benchmarks.options -->", "<!-- end of options -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="default")
    parser.add_argument("--updates", type=int, default=3, help="rounds a process, the first of which is not counted")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "options")
    args = parser.parse_args()
    work, shape = args.work.resolve(), SHAPES[args.shape]
    materials = write_materials(work / "materials", shape, prompts=shape.batch * args.updates)
    warmup = write_materials(work / "warm-up", SHAPES["tiny"], prompts=32)
    rows: list[dict[str, Any]] = []
    for tuning, options in RUNS.items():
        for option in options:
            kind = f"{tuning}_{option}" if option else tuning
            job = Job(shape, kind, args.updates, str(materials), str(warmup), str(work / f"{len(rows)}-{kind}"))
            rows.append({"tuning": tuning, "option": option, **compare.summary([run_side("ours", job)])})
            print(kind, f"{rows[-1]['seconds']:.2f} s, {rows[-1]['memory_mb']:.0f} MiB", flush=True)
            results.write("options", {"shape": shape.to_dict(), "updates": args.updates, "rows": rows})
    write_table()


def table(found: dict[str, Any]) -> list[str]:
    """Markdown rows: each option against the mean of its tuning's plain runs."""
    environment, rows = found["environment"], found["rows"]
    lines = [
        "| tuning | option | round, s | rollout | score | update | memory, MiB | time against plain | memory against plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain = [r for r in rows if r["tuning"] == row["tuning"] and not r["option"]]
        seconds, memory = (sum(r[key] for r in plain) / len(plain) for key in ("cpu_seconds", "memory_mb"))
        changes = ", ".join(f"`{key}: {str(value).lower()}`" for key, value in OPTIONS[row["option"]].items()) or "plain"
        phases = " | ".join(f"{row['phases'][name]:.2f}" for name in compare.PHASES)
        ratios = f"{row['cpu_seconds'] / seconds:.2f} | {row['memory_mb'] / memory:.2f}"
        lines.append(f"| {row['tuning']} | {changes} | {row['seconds']:.2f} | {phases} | {row['memory_mb']:.0f} | {ratios} |")
    model = found["shape"]
    cpu = environment["hardware"].get("cpu", "a CPU")
    told = f"{model['parameters'] / 1e6:.1f} million parameters, {model['batch']} × ({model['prompt']} + {model['response']}) tokens, "
    told += f"{model['epochs']} × {model['minibatches']} steps, float32, one thread of {cpu}, {found['date'][:10]}"
    notes = "Times against plain are of processor time; memory is the peak beyond the libraries."
    return [*lines, "", f"`python -m benchmarks.options`: {told}.", notes]


def write_table() -> None:
    found = results.read("options")
    assert found is not None
    text = PAGE.read_text()
    before, rest = text.split(START)
    PAGE.write_text(before + "\n".join([START, "", *table(found), "", END]) + rest.split(END)[1])


if __name__ == "__main__":
    main()
