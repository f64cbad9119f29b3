"""Score the answers of a finished run by other functions than the recipe's, without generating anything again.

    python recipes/rescore.py runs/smollm2_gsm8k recipes.scorers:hash_format recipes.scorers:last_number

Reads evaluation/<stage>.jsonl and config.yaml of the run, and the evaluation rows the configuration names. Prints, for each stage
and group, the mean over samples at temperature 1 and over greedy answers, and writes them to rescored.json in the run folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from srppo.config import load_recipe
from srppo.data.sources import read_rows
from srppo.errors import ConfigError, SrppoError
from srppo.scoring import Scorer, load_scorer

STAGES = ("base", "sft", "sft_continued", "srppo")
Means = dict[str, float]


def rescore(run: Path, scorers: dict[str, Scorer]) -> dict[str, dict[str, dict[str, Means]]]:
    """{stage: {group: {scorer: {"sampled", "greedy"}}}} of a run folder. Raises ConfigError where it holds no evaluation."""
    rows = evaluation_rows(run)
    files = {stage: run / "evaluation" / f"{stage}.jsonl" for stage in STAGES}
    out = {}
    for stage, path in files.items():
        if path.is_file():
            answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            groups = dict.fromkeys(answer["group"] for answer in answers)
            out[stage] = {g: score_group([a for a in answers if a["group"] == g], rows, scorers) for g in groups}
    if not out:
        raise ConfigError(f"{run} holds no evaluation/<stage>.jsonl; it is not a run folder, or its evaluations did not finish")
    return out


def evaluation_rows(run: Path) -> list[dict[str, Any]]:
    """The rows the run was evaluated on: of evaluation.prompts, or of the demonstrations it held out."""
    config = load_recipe(run / "config.yaml")
    if config.evaluation.prompts:
        return read_rows(config.evaluation.prompts, config.evaluation.prompts_split).rows
    return read_rows(config.data.demonstrations, config.data.demonstrations_split).rows


def score_group(answers: list[dict[str, Any]], rows: list[dict[str, Any]], scorers: dict[str, Scorer]) -> dict[str, Means]:
    """Mean scores of one group's answers."""
    return {
        name: {
            "sampled": statistics.fmean(score(text, rows[a["row"]]) for a in answers for text in a["sampled"]),
            "greedy": statistics.fmean(score(a["greedy"], rows[a["row"]]) for a in answers),
        }
        for name, score in scorers.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("scorer", nargs="+", help="module:function, exact_match or final_number")
    options = parser.parse_args(arguments)
    try:
        scorers = {spec: scorer for spec in options.scorer if (scorer := load_scorer(spec)) is not None}
        result = rescore(options.run, scorers)
    except SrppoError as error:
        print(f"rescore: {error}", file=sys.stderr)
        return 2
    for stage, groups in result.items():
        for group, means in groups.items():
            for name, mean in means.items():
                print(f"{stage:14} {group:24} {name:32} sampled {mean['sampled']:.3f}  greedy {mean['greedy']:.3f}")
    (options.run / "rescored.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
