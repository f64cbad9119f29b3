"""Does the thread watch see what it should? One and two threads on this machine, with and without busy neighbours; see docs/speed.md.

    python -m benchmarks.busy_threads [--seconds 12] [--rivals 0 1 2]

A rival is a process that counts in a loop. The work is a small network forward and backward, as of a small model's training step.
Also measured: what the phases of a PPO round cost themselves, in CPU time. Prints a table and writes benchmarks/results/busy_threads.json
(or into --results), row by row.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

import torch
from benchmarks.race import results

from srppo.machine import between, look, read
from srppo.profiling.phases import Phases
from srppo.threads import crowded

ROWS, WIDTH, LAYERS = 1024, 256, 8


def work(layers: list[torch.nn.Linear], x: torch.Tensor) -> None:
    hidden = x
    for layer in layers:
        hidden = torch.nn.functional.gelu(layer(hidden))
    hidden.sum().backward()


def measure(threads: int, seconds: float) -> dict[str, Any]:
    """A row: threads, steps a second, CPU over wall time, share of waiting and cores of others (None: not told), the watch's word."""
    torch.set_num_threads(threads)
    layers, x = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)], torch.randn(ROWS, WIDTH)
    work(layers, x)
    before, steps = read(), 0
    while time.perf_counter() - before.wall < seconds:
        work(layers, x)
        steps += 1
    spell = between(before, read())
    return {
        "threads": threads,
        "steps_per_second": steps / spell.wall,
        "cpu_over_wall": spell.cpu / spell.wall,
        "waited_share": spell.waited_share,
        "others_cores": spell.others,
        "warns": crowded(threads, spell),
    }


def line(row: dict[str, Any]) -> str:
    """The row in the table of docs/speed.md."""
    share, others = (f"{v:.2f}" if v is not None else "–" for v in (row["waited_share"], row["others_cores"]))
    rates = f"{row['steps_per_second']:.1f} | {row['cpu_over_wall']:.2f} | {share} | {others}"
    return f"| {row['rivals']} | {row['threads']} | {rates} | {'warns' if row['warns'] else 'silent'} |"


def overhead(count: int = 2000) -> float:
    """Microseconds of CPU time that a phase costs, its share of `take` (once for four phases) included."""
    phases = Phases(torch.device("cpu"))
    started = time.process_time()
    for i in range(count):
        with phases("rollout"):
            pass
        if i % 4 == 3:
            phases.take()
    return 1e6 * (time.process_time() - started) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--rivals", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--results", type=results.place, default=results.FOLDER)
    options = parser.parse_args()
    found, load = look(1.0), results.load_average()
    before = {"cores": found.cores, "quota": found.quota, "busy": found.busy, "load_average": load}
    print(f"{found.cores} cores, quota {found.quota}, others keep {found.busy:.1f} busy before we begin; load {load}")
    content: dict[str, Any] = {"seconds": options.seconds, "before": before, "phase_microseconds": overhead(), "rows": []}
    print(f"a phase costs {content['phase_microseconds']:.0f} microseconds of CPU time with {torch.get_num_threads()} threads")
    print("| rivals | threads | steps/s | CPU/wall | waited share | others' cores | the watch |\n|---|---|---|---|---|---|---|")
    for rivals in options.rivals:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(rivals)]
        try:
            for threads in (1, 2):
                row = {"rivals": rivals, **measure(threads, options.seconds)}
                print(line(row), flush=True)
                content["rows"].append(row)
                results.write("busy_threads", content, folder=options.results)
        finally:
            for other in others:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main()
