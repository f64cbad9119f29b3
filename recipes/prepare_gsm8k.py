"""Cut GSM8K into demonstrations, prompts and held-out questions for recipes/smollm2_gsm8k.yaml.

    python recipes/prepare_gsm8k.py                                # from the hub, openai/gsm8k
    python recipes/prepare_gsm8k.py --source FOLDER                # FOLDER/train.jsonl and FOLDER/test.jsonl

Source: grade-school math word problems by human writers (Cobbe et al. 2021, arXiv 2110.14168; openai/grade-school-math, MIT).

Writes into data/gsm8k/ (git-ignored):
    demonstrations.jsonl   {"question", "answer"}: the worked solution with the final number after `####`
    prompts.jsonl          {"question"}: other questions of the training split, without answers
    evaluation.jsonl       {"question", "answer"}: questions of the test split

Two choices of ours, both for a model of 135 million weights; results with them do not compare with published GSM8K scores:
- Calculator annotations such as <<48/2=24>> are taken out. They are marks for a tool the model does not have, and a fourth of the tokens.
- Only problems whose solution has at most --max-steps lines are taken (3: half of the data set).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ANNOTATION = re.compile(r"<<[^<>]*>>")


def clean(answer: str) -> str:
    """A worked solution without calculator annotations."""
    return ANNOTATION.sub("", answer)


def steps(answer: str) -> int:
    """Lines of the solution before the final number."""
    return sum(bool(line.strip()) and not line.startswith("####") for line in answer.splitlines())


def read_split(source: str, split: str) -> list[Row]:
    """Rows of SOURCE/<split>.jsonl, or of a hub data set. Raises FileNotFoundError or ValueError that says which row is wrong."""
    folder = Path(source)
    if folder.is_dir():
        path = folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        from datasets import load_dataset

        rows = [dict(row) for row in load_dataset(source, "main", split=split)]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("question"), str) or "####" not in str(row.get("answer")):
            raise ValueError(f"{source}, {split}, row {number}: not a GSM8K row (question, and an answer with ####)")
    return rows


def choose(rows: list[Row], count: int, max_steps: int, seed: int) -> list[Row]:
    """`count` distinct questions with solutions of at most max_steps lines, cleaned, in an order drawn by the seed."""
    short = {row["question"]: row for row in rows if steps(row["answer"]) <= max_steps}
    if len(short) < count:
        raise ValueError(f"only {len(short)} questions have solutions of at most {max_steps} lines, {count} are wanted; raise --max-steps")
    picked = random.Random(seed).sample(sorted(short), count)
    return [{"question": question, "answer": clean(short[question]["answer"])} for question in picked]


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="openai/gsm8k", help="hub id, or a folder with train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, default=Path("data/gsm8k"))
    parser.add_argument("--demonstrations", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--evaluation", type=int, default=200)
    parser.add_argument("--max-steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        train = choose(read_split(options.source, "train"), options.demonstrations + options.prompts, options.max_steps, options.seed)
        seen = {row["question"] for row in train}
        test = [row for row in read_split(options.source, "test") if row["question"] not in seen]
        evaluation = choose(test, options.evaluation, options.max_steps, options.seed)
    except (FileNotFoundError, ValueError) as error:
        print(f"prepare_gsm8k: {error}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "demonstrations.jsonl", train[: options.demonstrations])
    write(options.output / "prompts.jsonl", [{"question": row["question"]} for row in train[options.demonstrations :]])
    write(options.output / "evaluation.jsonl", evaluation)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
