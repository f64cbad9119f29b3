"""The race itself: ours and a peer in turn, over shapes and tunings, with the options of the command line."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.race import compare, results
from benchmarks.race.job import ROOT, Job, run_side
from benchmarks.race.materials import write_materials
from benchmarks.race.shapes import SHAPES, Shape

UPDATES = {"default": 4, "smollm2": 3, "tiny": 3}


@dataclass(frozen=True)
class Peer:
    """The other side of a tuning."""

    side: str  # module in benchmarks.race
    kinds: tuple[str, ...]  # Job.tuning of its runs; the first is the rival, the others are told beside it
    path: str | None = None  # put before PYTHONPATH
    options: tuple[str, ...] = ()  # of ours, told beside our plain run: compile, least_squares (see ours.recipe)


def options(description: str | None, name: str) -> argparse.Namespace:
    """The command line of a race."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["default", "smollm2"])
    parser.add_argument("--tunings", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--updates", type=int, help="rounds a process, the first of which is not counted")
    parser.add_argument("--turns", type=int, default=2, help="processes of each side")
    parser.add_argument("--quick", action="store_true", help="one turn of two rounds")
    parser.add_argument("--work", type=results.place, default=ROOT / "runs" / name)
    parser.add_argument("--results", type=results.place, default=results.FOLDER)
    args = parser.parse_args()
    if args.updates is not None and args.updates < 2:
        parser.error("--updates needs 2 or more: the first round of a process is not counted")
    return args


def race(shape: Shape, tuning: str, updates: int, turns: int, work: Path, peer: Peer) -> dict[str, Any]:
    """Ours and the peer in turn on one shape: a row of the result."""
    materials = write_materials(work / "materials" / shape.name, shape, prompts=shape.batch * updates // shape.samples)
    warmup = write_materials(work / "materials" / "warm-up", SHAPES["tiny"], prompts=32)

    def job(side: str, kind: str) -> Job:
        return Job(shape, kind, updates, str(materials), str(warmup), str(work / f"{shape.name}-{side}-{kind}"))

    def answer(side: str, kind: str, turn: int) -> dict[str, Any]:
        said = run_side(side, job(side, kind), peer.path if side == peer.side else None)
        print(f"{shape.name} {tuning} turn {turn + 1}: {said['system']} ({kind}) {compare.told(said)}", flush=True)
        return said

    rates = run_side("matmul", job("matmul", tuning))
    ours, theirs = list[dict[str, Any]](), {kind: list[dict[str, Any]]() for kind in peer.kinds}
    for turn in range(turns):
        ours.append(answer("ours", tuning, turn))
        for kind, answers in theirs.items():
            answers.append(answer(peer.side, kind, turn))
    others = {option: [answer("ours", f"{tuning}_{option}", turn) for turn in range(turns)] for option in peer.options}
    shutil.rmtree(materials)
    return compare.row(shape, tuning, updates, ours, theirs, rates, others)


def race_all(name: str, args: argparse.Namespace, peers: Mapping[str, Peer], samples: int, packages: Mapping[str, str]) -> None:
    """Every shape and tuning, results written as they come."""
    wanted = [(shape, tuning) for shape in args.shapes for tuning in args.tunings]
    rows = results.kept_rows(name, ("name", "tuning"), wanted, packages, args.results)
    for shape_name, tuning in wanted:
        updates = 2 if args.quick else args.updates or UPDATES[shape_name]
        load = results.load_average()
        row = race(SHAPES[shape_name].changed(samples=samples), tuning, updates, 1 if args.quick else args.turns, args.work, peers[tuning])
        rows.append({"name": shape_name, "date": results.now(), "load_average_before": load, **row})
        rows.sort(key=lambda row: (list(SHAPES).index(row["name"]), row["tuning"]))
        results.write(name, {"rows": rows}, packages, args.results)
    results.write_page(args.results)
