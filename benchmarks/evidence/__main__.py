"""The project's evidence in the embedded world, over seeds. One command a question, resumable; several processes may share one.

    python -m benchmarks.evidence                          everything, then the page
    python -m benchmarks.evidence methods                  a question: methods, overlap, demonstrations, strength, beta, numerator, tuning
    python -m benchmarks.evidence --part 1/2 & python -m benchmarks.evidence --part 2/2
    python -m benchmarks.evidence --choices                what settings were chosen by, on seeds of their own
    python -m benchmarks.evidence --page                   only docs/results/evidence.md, from the result file
    python -m benchmarks.evidence --seeds 500 501          other seeds: their results and page go into the runs' folder

Rows go to benchmarks/results/evidence.jsonl as they are finished; what is there is not run again. One thread a process.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from benchmarks.evidence.cases import CHOICES, QUESTIONS, SEEDS, TUNING_SEEDS, unrunnable
from benchmarks.evidence.run import Results, produce

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--only", nargs="+", default=None, help="names of rows, instead of questions")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--part", type=share, default=(1, 1), metavar="I/N", help="this process's share of the seeds")
    parser.add_argument("--choices", action="store_true", help="the settings that were tried, on the tuning seeds")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    options = parser.parse_args()
    if unknown := set(options.questions) - set(QUESTIONS):
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    for name in options.only or []:
        if wrong := unrunnable(name):
            parser.error(wrong)
    shown = tuple(options.seeds or SEEDS)
    own = not set(shown) <= set(SEEDS) and not options.choices  # then the committed results are left as they are
    folder = options.runs if own else ROOT / "benchmarks/results"
    results = Results(options.results or folder / ("evidence_choices.jsonl" if options.choices else "evidence.jsonl"))
    if not options.page:
        part, parts = options.part
        seeds = options.seeds or list(TUNING_SEEDS if options.choices else SEEDS)
        asked = CHOICES if options.choices else [n for q in options.questions or QUESTIONS for n in QUESTIONS[q]]
        names = list(dict.fromkeys(options.only or asked))
        for seed in seeds[part - 1 :: parts]:
            run_seed(seed, names, results, options.runs)
    if not options.only and not options.choices:
        from benchmarks.evidence.page import write_page  # plotting is slow to import

        page = write_page(results.rows(), options.runs if own else ROOT / "docs/results", shown if own else SEEDS)
        print(f"{page} is written")


def share(text: str) -> tuple[int, int]:
    """ "1/2" as (1, 2)."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 1/2")
    return part, parts


def run_seed(seed: int, names: list[str], results: Results, runs: Path) -> None:
    for i, name in enumerate(names):
        if (name, seed) in results.rows():
            continue
        started = time.monotonic()
        rows = produce(name, seed, runs)
        results.add([row for row in rows if (row["name"], seed) not in results.rows()])
        said = ", ".join(f"{row['name']} {accuracy(row)}" for row in rows)
        print(f"seed {seed}, {i + 1}/{len(names)}: {said}; {time.monotonic() - started:.0f} s", flush=True)


def accuracy(row: dict) -> str:
    parts = [sum(map(int, g["right"])) / (g["samples"] * len(g["right"])) for g in row["groups"].values()]
    return " / ".join(f"{100 * p:.1f}" for p in parts)


if __name__ == "__main__":
    main()
