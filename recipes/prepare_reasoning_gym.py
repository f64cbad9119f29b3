"""Make short-answer tasks with reasoning-gym for recipes/smollm2_reasoning_gym.yaml.

    pip install reasoning-gym==0.1.25             # generators with exact answers (Apache-2.0)
    python recipes/prepare_reasoning_gym.py

Writes into data/reasoning_gym/ (git-ignored), no question twice in all three files:
    demonstrations.jsonl   {"question", "answer", "task", "group"}: the bare answer, 32 for each of three tasks
    prompts.jsonl          {"question", "task", "group"}: those tasks and three more that have no demonstrations; no answers
    evaluation.jsonl       {"question", "answer", "task", "group"}: further questions of all six
`group` is with_demonstrations or without_demonstrations; answers are judged strictly, as exact matches.

The difficulties are ours, chosen so that a model of 135 million weights knows some answers and not others. With reasoning-gym's
defaults (four-digit numbers, six terms) it knows next to none, and a reward that tells right from wrong has nothing to work on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, str]

WITH_DEMONSTRATIONS: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 2, "max_digits": 1},
    "products": {"max_digits": 1},
    "letter_counting": {"min_words": 3, "max_words": 6},
}
WITHOUT_DEMONSTRATIONS: dict[str, dict[str, Any]] = {
    # No division: without parentheses, version 0.1.25 answers another division than the one it asks about.
    "basic_arithmetic": {"max_terms": 2, "max_digits": 1, "operators": ["+", "-", "*"], "allow_parentheses": False},
    "gcd": {"max_value": 20},
    "leg_counting": {"min_animals": 1, "max_animals": 1, "max_instances": 2},
}
MOST_DRAWS = 50  # times the wanted questions, drawn before a task counts as too small


def questions(task: str, options: dict[str, Any], group: str, count: int, seed: int) -> list[Row]:
    """`count` distinct questions of a task. Raises ValueError where the task cannot give so many."""
    import reasoning_gym

    found: dict[str, Row] = {}
    for item in reasoning_gym.create_dataset(task, seed=seed, size=MOST_DRAWS * count, **options):
        question = item["question"].strip()
        found.setdefault(question, {"question": question, "answer": str(item["answer"]), "task": task, "group": group})
        if len(found) == count:
            return list(found.values())
    raise ValueError(
        f"{task} with {options} has only {len(found)} different questions, {count} are wanted; ask for fewer, or make it harder"
    )


def deal(demonstrations: int, prompts: int, evaluation: int, seed: int) -> dict[str, list[Row]]:
    """Rows of the three files, every task's questions dealt among them."""
    files: dict[str, list[Row]] = {"demonstrations": [], "prompts": [], "evaluation": []}
    groups = {"with_demonstrations": WITH_DEMONSTRATIONS, "without_demonstrations": WITHOUT_DEMONSTRATIONS}
    for group, tasks in groups.items():
        shown = demonstrations if group == "with_demonstrations" else 0
        for task, options in tasks.items():
            rows = questions(task, options, group, shown + evaluation + prompts, seed)
            files["demonstrations"] += rows[:shown]
            files["evaluation"] += rows[shown : shown + evaluation]
            files["prompts"] += [{k: v for k, v in row.items() if k != "answer"} for row in rows[shown + evaluation :]]
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/reasoning_gym"))
    parser.add_argument("--demonstrations", type=int, default=32, help="a task that has them")
    parser.add_argument("--prompts", type=int, default=36, help="a task")
    parser.add_argument("--evaluation", type=int, default=30, help="a task")
    parser.add_argument("--seed", type=int, default=2, help="0, 1 and 101 were used to choose the recipe's settings")
    options = parser.parse_args(arguments)
    try:
        files = deal(options.demonstrations, options.prompts, options.evaluation, options.seed)
    except ImportError:
        print("prepare_reasoning_gym: reasoning-gym is not installed; run: pip install reasoning-gym==0.1.25", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"prepare_reasoning_gym: {error}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = options.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
