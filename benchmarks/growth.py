"""How time and memory of a PPO round grow with the response length, the batch, the vocabulary and the model. One command:

python -m benchmarks.growth [--what response batch vocab model] [--updates 3]

Each is varied over four or five points with the others fixed; a power law a x^b is fitted to each by least squares of the logarithms,
with b's standard error. One thread, float32, full tuning; time is processor seconds, which other work on the machine disturbs least.
Writes benchmarks/results/growth.json, docs/results/speed/growth.png and docs/results/speed.md.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.race import compare, results
from benchmarks.race.job import ROOT, Job, run_side
from benchmarks.race.materials import write_materials
from benchmarks.race.shapes import SHAPES, Model, Shape

NAME = "growth"
MODEL = Model(layers=4, hidden=128, intermediate=512, heads=4, kv_heads=4, vocab=2048, tied=True)
BASE = Shape("growth", MODEL, batch=32, prompt=16, response=32, epochs=2, minibatches=2)


def model_of(hidden: int) -> Model:
    return Model(layers=4, hidden=hidden, intermediate=4 * hidden, heads=hidden // 32, kv_heads=hidden // 32, vocab=2048, tied=True)


def vocabulary(size: int) -> Model:
    return Model(layers=4, hidden=128, intermediate=512, heads=4, kv_heads=4, vocab=size, tied=True)


# What is varied: the axis's name and unit, and the shape at each of its values. The model's axis is its number of parameters.
AXES: dict[str, tuple[str, list[tuple[float, Shape]]]] = {
    "response": ("response length, tokens", [(t, BASE.changed(response=t)) for t in (16, 32, 64, 128, 256)]),
    "batch": ("responses a round", [(b, BASE.changed(batch=b)) for b in (8, 16, 32, 64, 128)]),
    "vocab": ("vocabulary", [(v, BASE.changed(model=vocabulary(v))) for v in (1024, 4096, 16384, 49152)]),
    "model": ("parameters", [(model_of(h).parameters(), BASE.changed(model=model_of(h))) for h in (64, 128, 256, 384, 512)]),
}


def power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares of log y = log a + b log x: exponent b, its standard error (0 degrees of freedom: infinite), and a."""
    n = len(x)
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    exponent = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v)) / spread
    residual = sum((b - mean_v - exponent * (a - mean_u)) ** 2 for a, b in zip(u, v))
    error = math.sqrt(residual / (n - 2) / spread) if n > 2 else math.inf
    return {"exponent": exponent, "standard_error": error, "factor": math.exp(mean_v - exponent * mean_u)}


def measure(shape: Shape, updates: int, work: Path) -> dict[str, Any]:
    """One point: the least of the counted rounds, as other work only adds."""
    materials = write_materials(work / "materials", shape, prompts=shape.batch * updates)
    warmup = write_materials(work / "warm-up", SHAPES["tiny"], prompts=32)
    said = run_side("ours", Job(shape, "full", updates, str(materials), str(warmup), str(work / "ours")))
    shutil.rmtree(materials)
    return {
        "seconds": min(said["seconds"][1:]),
        "cpu_seconds": min(said["cpu_seconds"][1:]),
        "phases": {name: min(said["phases"][name][1:]) for name in compare.PHASES},
        "memory_mb": said["rss_peak_mb"] - said["rss_before_mb"],
        "response_tokens": statistics.fmean(said["response_tokens"]),
        "load_average": results.load_average(),
    }


def draw(content: dict[str, Any], path: Path) -> None:
    """Time and memory over each axis, points and fitted lines."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    axes = content["axes"]
    figure, grid = plt.subplots(2, len(axes), figsize=(3.2 * len(axes), 5.2), squeeze=False, constrained_layout=True)
    for column, (name, axis) in enumerate(axes.items()):
        x = [point["x"] for point in axis["points"]]
        for row, (key, unit) in enumerate((("cpu_seconds", "processor seconds a round"), ("memory_mb", "MiB beyond the libraries"))):
            panel, fit = grid[row][column], axis["fits"][key]
            panel.loglog(x, [point[key] for point in axis["points"]], "o", color="#1f4e79")
            panel.loglog(x, [fit["factor"] * value ** fit["exponent"] for value in x], "-", color="#c55a11", linewidth=1)
            panel.set_title(f"{name}: exponent {fit['exponent']:.2f} ± {fit['standard_error']:.2f}", fontsize=9)
            panel.set_xlabel(axis["title"], fontsize=8)
            panel.set_ylabel(unit if column == 0 else "", fontsize=8)
            panel.set_xticks(x, [f"{value / 1e6:.3g} M" if value >= 1e5 else f"{value:g}" for value in x])
            measured = [point[key] for point in axis["points"]]
            panel.set_yticks(measured, [f"{value:.3g}" for value in measured])
            panel.minorticks_off()
            panel.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--updates", type=int, default=3, help="rounds a point, the first of which is not counted")
    parser.add_argument("--work", type=results.place, default=ROOT / "runs" / NAME)
    parser.add_argument("--results", type=results.place, default=results.FOLDER)
    args = parser.parse_args()
    content: dict[str, Any] = {"shape": BASE.to_dict(), "axes": {}}
    known: dict[Shape, dict[str, Any]] = {}  # the base shape lies on several axes
    for name in args.what:
        title, shapes = AXES[name]
        points = []
        for x, shape in shapes:
            if shape not in known:
                known[shape] = measure(shape, max(2, args.updates), args.work)
            point = known[shape]
            points.append({"x": x, **point})
            print(f"{name} {x}: {point['cpu_seconds']:.2f} s, {point['memory_mb']:.0f} MiB", flush=True)
        fits = {key: power_law([p["x"] for p in points], [p[key] for p in points]) for key in ("seconds", "cpu_seconds", "memory_mb")}
        content["axes"][name] = {"title": title, "points": points, "fits": fits}
        results.write(NAME, content, folder=args.results)
    page = results.page_of(args.results)
    draw(content, page.parent / "speed" / "growth.png")
    results.write_page(args.results)


if __name__ == "__main__":
    main()
