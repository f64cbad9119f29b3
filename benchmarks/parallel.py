"""Several processes on this machine: what they send and hold, against the plan's word, and how time goes down. One command:

python -m benchmarks.parallel

Each case is a whole `srppo align` of one PPO round on a random model (those of plan_check.py), by one process and by 2 and 4 that torchrun
starts, with gloo. Counted are the bytes that a process hands to torch.distributed's collectives (profiling/traffic.py), its peak of
resident memory beyond what it held before the models were loaded, seconds by phase, and of them those in collectives. Four processes on
two cores say nothing of time. Writes benchmarks/results/parallel.json and the table in docs/scaling.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.plan_check import LONG, LORA, SHORT, SMALL, SMOL, Watch, write_case

from srppo.environment import environment

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "scoring", "update")
ROUND = {"ppo.prompts_per_iteration": 32, "ppo.minibatches": 2, "ppo.epochs": 2, "ppo.micro_batch_tokens": 512, "sft.batch_size": 16}
CASES: dict[str, dict[str, Any]] = {
    "full": {"shape": SMALL, "lengths": LONG, **ROUND},
    "lora": {"shape": SMALL, "lengths": LONG, **ROUND, **LORA},
    "49k vocabulary, full": {"shape": SMOL, "lengths": SHORT, **ROUND},
    "49k vocabulary, lora": {"shape": SMOL, "lengths": SHORT, **ROUND, **LORA},
}
# (case, processes, parallel.shard_size)
RUNS: list[tuple[str, int, int | None]] = [(case, n, None) for case in CASES for n in (1, 2, 4)] + [("full", 2, 1), ("full", 4, 2)]
TOLERANCE = {"bytes": 0.02, "memory": 0.25}


def child(recipe: str, place: str) -> None:
    """One of the processes: align, and write what it sent, held and took to place/RANK.json."""
    import datasets  # noqa: F401  libraries are loaded before the models, as in a run
    import torch

    import srppo.train.ppo
    import srppo.workspace
    from srppo.config import load_recipe
    from srppo.job import align
    from srppo.meeting import end, start_world
    from srppo.models import sharding  # noqa: F401  torch.distributed's modules too
    from srppo.profiling.memory import MIB, resident
    from srppo.profiling.traffic import Traffic, counted
    from srppo.progress import make_progress

    config, watch, here = load_recipe(recipe), Watch(), start_world()
    (torch.ones(512, 512) @ torch.ones(512, 512)).sum()  # and so are the threads and buffers of matrix products
    sent: dict[str, dict[str, float]] = {}
    link = gloo() if not here.alone else {}

    with counted(Traffic()) as traffic:

        def over(module: Any, name: str, phase: str) -> None:
            inner = getattr(module, name)

            def watched(*args: Any, **options: Any) -> Any:
                here.barrier()
                traffic.take()
                begun = time.perf_counter()
                try:
                    return inner(*args, **options)
                finally:
                    sent[phase] = {**{k: float(v) for k, v in traffic.bytes.items()}, "seconds": time.perf_counter() - begun}
                    sent[phase] |= traffic.take()

            setattr(module, name, watched)

        for name, phase in (("collect", "rollout"), ("score", "scoring"), ("update", "update")):
            over(srppo.train.ppo, name, phase)
        watch.over(srppo.workspace, "build_roles", "load")
        align(config, progress=make_progress("quiet" if here.main else "silent"))
    peak = round(resident().so_far()[""] * MIB)  # srppo's own phases reset the system's
    found = {"peak": peak - watch.start, "start": watch.start, "sent": sent, "link": link}
    (Path(place) / f"{here.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    end(0)


def gloo() -> dict[str, float]:
    """Bytes a second that a process sends in an all-gather of 32 MB, and seconds of one of 16 bytes; the best of five."""
    import torch
    import torch.distributed as dist

    def best(count: int) -> float:
        own = torch.ones(count)
        out = [torch.empty(count) for _ in range(dist.get_world_size())]
        seconds = []
        for _ in range(5):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_gather(out, own)
            seconds.append(time.perf_counter() - begun)
        return min(seconds)

    count = 8_000_000
    return {"rate": 4 * count * (dist.get_world_size() - 1) / best(count), "call": best(4)}


def launch(recipe: Path, place: Path, processes: int) -> list[dict[str, Any]]:
    """What each process found, by rank."""
    script = [str(Path(__file__).resolve()), "--child", str(recipe), str(place)]
    torchrun = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src"), *([env["PYTHONPATH"]] if env.get("PYTHONPATH") else [])])
    done = subprocess.run([sys.executable, *torchrun, *script], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return [json.loads((place / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


def measure(case: str, processes: int, shard_size: int | None) -> dict[str, Any]:
    """A run planned and measured."""
    from srppo.config import dump
    from srppo.planning.run import run_plan

    with tempfile.TemporaryDirectory() as place:
        config = write_case(Path(place), CASES[case] | {"parallel.shard_size": shard_size})
        recipe = Path(place) / "recipe.yaml"
        recipe.write_text(dump(config), encoding="utf-8")
        planned = run_plan(config, gpus=processes).to_dict()
        found = launch(recipe, Path(place), processes)
    flows = [f for f in planned.get("traffic", []) if f["collective"] != "file"]
    seconds, network = planned["seconds"], planned["seconds"]["network"]
    names = dict(zip(PHASES, ("rollout", "score", "update"), strict=True))
    return {
        "case": case,
        "processes": processes,
        "shard_size": shard_size,
        "plan": {
            "peak": planned["peak_bytes"] - planned["libraries_bytes"],
            "bytes": {phase: sum(f["bytes"] for f in flows if f["phase"] == phase) for phase in PHASES},
            "seconds": {phase: seconds[names[phase]] for phase in PHASES},
            "network": {phase: network.get(phase, 0.0) for phase in PHASES},
        },
        "measured": {
            "peak": max(f["peak"] for f in found),
            "bytes": {phase: max(f["sent"][phase].get("comm/bytes", 0.0) for f in found) for phase in PHASES},
            "seconds": {phase: max(f["sent"][phase]["seconds"] for f in found) for phase in PHASES},
            "network": {phase: max(f["sent"][phase].get("timing/comm", 0.0) for f in found) for phase in PHASES},
            "link": found[0]["link"],
        },
    }


def table(result: dict[str, Any]) -> str:
    """Markdown for docs/scaling.md."""
    lines = [
        "| run | processes | sent by each: planned | counted | memory of each: planned | measured | a round | of it in collectives |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        plan, found = run["plan"], run["measured"]
        sent = [sum(side["bytes"].values()) / 1e6 for side in (plan, found)]
        name = run["case"] + ("" if run["shard_size"] is None else f", shard_size {run['shard_size']}")
        took = sum(found["seconds"].values())
        lines.append(
            f"| {name} | {run['processes']} | {sent[0]:,.1f} MB | {sent[1]:,.1f} MB | {plan['peak'] / 1e6:,.0f} MB "
            f"| {found['peak'] / 1e6:,.0f} MB "
            f"| {took:.1f} s | {100 * sum(found['network'].values()) / took:.0f} % |"
        )
    rates = [r["measured"]["link"] for r in result["runs"] if r["measured"]["link"]]
    fast, quick = max(link["rate"] for link in rates), min(link["call"] for link in rates)
    where = f"{result['date']}, {result['environment']['hardware']['cpu']}, two cores, one thread a process"
    lines += ["", f"{where}; gloo on this machine: {fast / 1e9:.2f} GB/s a process, {1e3 * quick:.2f} ms a small collective."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run the cases whose names hold this, print them and write nothing")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    runs = []
    for case, processes, shard_size in RUNS:
        if args.only is None or args.only in f"{case}, {processes} processes, shard_size {shard_size}":
            runs.append(measure(case, processes, shard_size))
            print(json.dumps(runs[-1], indent=1 if args.only else None), flush=True)
    if args.only is not None:
        return
    result = {"date": datetime.date.today().isoformat(), "environment": environment(), "runs": runs}
    (ROOT / "benchmarks/results/parallel.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = ROOT / "docs/scaling.md"
    old = page.read_text(encoding="utf-8")
    fresh = re.sub(r"(?<=<!-- parallel -->\n).*?(?=<!-- end of parallel -->)", lambda _: table(result) + "\n", old, flags=re.S)
    page.write_text(fresh, encoding="utf-8")
    wrong = []
    for run in runs:
        for what, (plan, found) in {
            "bytes": tuple(sum(run[side]["bytes"].values()) for side in ("plan", "measured")),
            "memory": tuple(run[side]["peak"] for side in ("plan", "measured")),
        }.items():
            if abs(plan - found) > TOLERANCE[what] * found:
                wrong.append(
                    f"{run['case']}, {run['processes']} processes: {what} planned {plan / 1e6:.1f} MB, measured {found / 1e6:.1f} MB"
                )
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
