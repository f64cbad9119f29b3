"""Does the thread watch see what it should? One and two threads on this machine, with and without busy neighbours; see docs/speed.md.

    python benchmarks/busy_threads.py [--seconds 12] [--rivals 0 1 2]

A rival is a process that counts in a loop. The work is a small network forward and backward, as of a small model's training step.
Also measured: what the phases of a PPO round cost themselves, in CPU time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import torch

from srppo.machine import between, look, read
from srppo.profiling.phases import Phases
from srppo.threads import crowded

ROWS, WIDTH, LAYERS = 1024, 256, 8


def work(layers: list[torch.nn.Linear], x: torch.Tensor) -> None:
    hidden = x
    for layer in layers:
        hidden = torch.nn.functional.gelu(layer(hidden))
    hidden.sum().backward()


def measure(threads: int, seconds: float) -> str:
    """A row: threads, steps a second, CPU use, share of waiting, others' cores, the watch's word."""
    torch.set_num_threads(threads)
    layers, x = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)], torch.randn(ROWS, WIDTH)
    work(layers, x)
    before, steps = read(), 0
    while time.perf_counter() - before.wall < seconds:
        work(layers, x)
        steps += 1
    spell = between(before, read())
    share, others = (f"{v:.2f}" if v is not None else "–" for v in (spell.waited_share, spell.others))
    word = "warns" if crowded(threads, spell) else "silent"
    return f"| {threads} | {steps / spell.wall:.1f} | {spell.cpu / spell.wall:.2f} | {share} | {others} | {word} |"


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
    options = parser.parse_args()
    machine = look(1.0)
    print(
        f"{machine.cores} cores, quota {machine.quota}, others keep {machine.busy:.1f} busy before we begin; load {os.getloadavg()[0]:.1f}"
    )
    print(f"a phase costs {overhead():.0f} microseconds of CPU time with {torch.get_num_threads()} threads")
    print("| rivals | threads | steps/s | CPU/wall | waited share | others' cores | the watch |\n|---|---|---|---|---|---|---|")
    for rivals in options.rivals:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(rivals)]
        try:
            for threads in (1, 2):
                print(f"| {rivals} {measure(threads, options.seconds)}", flush=True)
        finally:
            for other in others:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main()
