"""The same comparison on a real model, at small scale: SmolLM2-135M-Instruct on the tasks of the recipes.

    python -m benchmarks.evidence.real reasoning_gym --seeds 5            one seed: about three hours of one core
    python -m benchmarks.evidence.real gsm8k                              what needs no training, beside the recipe's finished run
    python -m benchmarks.evidence.real --page                             only docs/results/evidence_real.md, from the result file

Settings of the methods are those chosen in the embedded world (cases.py), none is tuned here; all else is the recipe's, with fewer
rounds. Rows go to benchmarks/results/evidence_real.jsonl as they are finished; what is there is not run again. Several processes may
share the work, each with rows of its own (--only). Needs what recipes/smollm2_reasoning_gym.yaml and smollm2_gsm8k.yaml need.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.evidence.cases import CARD, FREE, PPOS, start_of, title
from benchmarks.evidence.free import judge
from benchmarks.evidence.page import table
from benchmarks.evidence.rewardmodel import make_pairs, train_reward_model
from benchmarks.evidence.run import Results, Row
from recipes.prepare_reasoning_gym import main as prepare

from srppo.config import RunConfig, load_recipe
from srppo.data.sources import read_rows
from srppo.evaluate import Answers
from srppo.files import read_lines
from srppo.job import align, run_ppo, run_sft
from srppo.progress import make_progress
from srppo.scoring import load_scorer
from srppo.workspace import open_workspace

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/evidence_real.jsonl"
PAGE = ROOT / "docs/results/evidence_real.md"
ROUNDS = 7  # half of the recipe's, and where the prototype was best
SAMPLES = 4  # a prompt, on reasoning-gym
FREE_SAMPLES = {"best_of": 1, "logits": 2, "weights": 2, "temperature": 2}  # fewer without training: the best of 16 takes 16 times as many
QUIET = {"diagnose.enabled": False, "guard.every": 0, "evaluation.every": 0, "ppo.checkpoint_every": 0}


@dataclass(frozen=True)
class Measure:
    """A column of the table: the answers of a group of prompts, judged by a scorer."""

    title: str
    group: str
    scorer: str


@dataclass(frozen=True)
class Task:
    recipe: str
    measures: dict[str, Measure]
    names: list[str]
    about: str
    sft: str  # what its SFT is called
    finished: str | None = None  # the folder of the recipe's own run, whose rows are taken as they are
    changes: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "reasoning_gym": Task(
        "recipes/smollm2_reasoning_gym.yaml",
        {
            "with": Measure("with", "with_demonstrations", "exact_match"),
            "without": Measure("without", "without_demonstrations", "exact_match"),
        },
        [
            *("base", "sft/light", "sft/low-lr", "continued/eos", "free/cool", "free/best-of-16", "free/drawn-of-16"),
            *("free/logits-2", "free/logits-1", "free/logits-0.5", "free/weights-0.25", "free/weights-0.5", "free/weights-1"),
            *("ppo/eos", "ppo/card", "ppo/after", "ppo/token", "ppo/reward-model", "ppo/length", "ppo/shift"),
        ],
        f"Demonstrations of three short-answer tasks, prompts of six; {ROUNDS} rounds of 24 prompts with 4 samples each. Strict accuracy"
        "\nin percent, 90 prompts a group.",
        "SFT (8 steps at 3e-5)",
        changes={"ppo.iterations": ROUNDS, "evaluation.samples": SAMPLES},
    ),
    "gsm8k": Task(
        "recipes/smollm2_gsm8k.yaml",
        {
            "format": Measure("#### format", "all", "recipes.scorers:hash_format"),
            "right": Measure("right", "all", "recipes.scorers:last_number"),
        },
        ["base", "sft/light", "continued/eos", "free/cool", "free/best-of-16", "free/logits-1", "free/weights-0.5", "ppo/eos"],
        "The recipe's run (11 rounds of 32 prompts, LoRA) on 64 questions, in percent: answers that end in the demonstrations' format, and"
        "\nanswers whose last number is right, which this model can hardly do.",
        "SFT (one epoch)",
        finished="runs/smollm2_gsm8k",
    ),
}
# What differs from the embedded world's cases: a tenth of this recipe's rate, ten times its steps; two checkpoints for the card.
LOW_RATE = {"sft.learning_rate": 3e-6, "sft.steps": 80}
REAL_CARD = CARD | {"sft.checkpoints_at": [0.5, 1.0], "guard.every": 2}
REWARD_MODEL_RATE = 2e-5


class Bench:
    """The runs of one task and seed."""

    def __init__(self, name: str, seed: int, runs: Path):
        self.task, self.seed, self._runs = TASKS[name], seed, runs / name / str(seed)
        self._files: dict[str, Any] = {}
        if name == "reasoning_gym":
            data = self._prepared(seed)
            self._files = {f"data.{part}": str(data / f"{part}.jsonl") for part in ("demonstrations", "prompts")}
            self._files["evaluation.prompts"] = str(data / "evaluation.jsonl")

    def config(self, name: str, changes: dict[str, Any]) -> RunConfig:
        fixed = {"seed": self.seed, "output": str(self._runs / name), "evaluation.continued_sft": False}
        return load_recipe(ROOT / self.task.recipe, fixed | QUIET | self._files | self.task.changes | changes)

    def rows(self, name: str) -> list[Row]:
        """The row of that name, and those that come with it."""
        kind, _, rest = name.partition("/")
        if kind == "free":
            return [self._free(rest)]
        if self.task.finished or name == "continued/eos":
            stages = {"base": "base", "sft/light": "sft", "continued/eos": "sft_continued", "ppo/eos": "srppo"}
            return [self._row(self.run("ppo/eos"), stages[name], name)]
        if name in ("base", "sft/light"):
            folder = self.run("sft/light")
            return [self._row(folder, "base", "base"), self._row(folder, "sft", "sft/light")]
        return [self._row(self.run(name), "srppo" if kind == "ppo" else "sft", name)]

    def run(self, name: str) -> Path:
        """The folder of a finished run."""
        if self.task.finished:
            return ROOT / self.task.finished
        folder = self._runs / name.replace("/", "-")
        if not (folder / "summary.json").is_file():
            kind, _, rest = name.partition("/")
            changes = self._changes(kind, rest)
            work = run_sft if kind == "sft" else run_ppo if "sft.checkpoint" in changes and rest != "eos" else align
            resume = (folder / "config.yaml").is_file()
            work(self.config(folder.name, changes), resume=resume, progress=make_progress("plain"))
            shutil.rmtree(folder / "critic", ignore_errors=True)
        return folder

    def _changes(self, kind: str, rest: str) -> dict[str, Any]:
        if kind == "sft":
            return LOW_RATE if rest == "low-lr" else {}
        if rest == "card":
            return REAL_CARD
        case = PPOS[rest]
        changes = case.changes | {"sft.checkpoint": str(self.run("sft/light") / "sft"), "evaluation.continued_sft": rest == "eos"}
        if case.after:
            changes |= {"sft.checkpoint": str(self.run(f"ppo/{case.after}") / "sft_continued")}
            changes |= {"reward.checkpoint": str(self.run("sft/light") / "sft")}
        if case.reward_model:
            changes |= {"reward.kind": "preference_model", "reward.preference_model": str(self._reward_model())}
        return changes

    def _free(self, name: str) -> Row:
        started, samples = time.monotonic(), FREE_SAMPLES[FREE[name].how]
        sft = self.run("sft/light") / "sft"
        config = self.config(f"free-{name}", {"sft.checkpoint": str(sft), "evaluation.samples": samples})
        with open_workspace(config, make_progress("plain"), overwrite=Path(config.output).exists()) as space:
            found = judge(space, FREE[name], samples)
        shutil.rmtree(config.output)
        return self._measured(f"free/{name}", found.rows, found.to_dict()) | {"seconds": time.monotonic() - started}

    def _row(self, folder: Path, stage: str, name: str) -> Row:
        summary = json.loads((folder / "summary.json").read_text())
        answers = [Answers(**row) for row in read_lines(folder / f"evaluation/{stage}.jsonl")]
        trained = {"srppo": "ppo", "base": ""}.get(stage, stage)
        row = self._measured(name, answers, summary[stage])
        row |= {"heldout_nll": summary["heldout_nll"].get(stage), "forgetting": summary["forgetting"].get(stage)}
        row |= {"passes": (summary["compute"].get(trained) or {}).get("passes"), "seconds": summary["stage_seconds"].get(trained)}
        if (folder / "diagnose.json").is_file():
            card = json.loads((folder / "diagnose.json").read_text())
            row["card"] = {"verdict": card["verdict"], "reasons": card["reasons"], "decision": card["decision"]}
        return row

    def _measured(self, name: str, answers: list[Answers], results: dict[str, Any]) -> Row:
        """Right answers prompt by prompt, as digits, measure by measure."""
        asked = read_rows(self.config("-", {}).evaluation.prompts or "", None).rows
        groups = {}
        for key, measure in self.task.measures.items():
            scorer, result = load_scorer(measure.scorer), results[measure.group]
            assert scorer is not None
            own = sorted((a for a in answers if a.group == measure.group), key=lambda a: a.row)
            groups[key] = {
                "right": "".join(str(round(sum(scorer(text, asked[a.row]) for text in a.sampled))) for a in own),
                "greedy": "".join(str(round(scorer(a.greedy, asked[a.row]))) for a in own),
                "samples": result["samples"],
                "length": round(result["mean_length"], 4),
                "ends": round(result["eos_rate"], 4),
            }
        return {"name": name, "seed": self.seed, "groups": groups}

    def _prepared(self, seed: int) -> Path:
        folder = self._runs / f"data-{seed}"
        if not (folder / "evaluation.jsonl").is_file() and prepare(["--seed", str(seed), "--output", str(folder)]):
            raise SystemExit(2)
        return folder

    def _reward_model(self) -> Path:
        """Trained on right and wrong answers of the SFT model to questions of all six tasks that are in no other file."""
        folder = self._runs / "reward-model"
        if not (folder / "training.json").is_file():
            used = {row["question"] for row in read_rows(self._files["evaluation.prompts"], None).rows}
            rows = [r for r in read_lines(self._prepared(self.seed + 1000) / "evaluation.jsonl") if r["question"] not in used]
            labelled = self._runs / "labelled.jsonl"
            labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
            sft = self.run("sft/light") / "sft"
            config = self.config("pairs", {"sft.checkpoint": str(sft), "data.prompts": str(labelled)})
            with open_workspace(config, make_progress("plain"), overwrite=Path(config.output).exists()) as space:
                pairs = make_pairs(space, self.seed)
                space.loaded.roles.tokenizer.save_pretrained(folder / "model")
            shutil.rmtree(config.output)
            figures = train_reward_model(pairs, sft, folder / "model", self.seed, rate=REWARD_MODEL_RATE)
            (folder / "training.json").write_text(json.dumps(figures))
        return folder / "model"


def tagged(rows: Iterable[Row], task: str) -> list[Row]:
    return [row | {"task": task} for row in rows]


def write_page(rows: list[Row], page: Path) -> None:
    lines = ["# The methods on a real model", "", (__doc__ or "").split("\n")[0], ""]
    lines += [
        "Modest runs on CPU; with one seed of a task, intervals are over its prompts alone. Settings of the methods are those chosen in",
        "the [embedded world](evidence.md); none was tuned here. Gains: paired over prompts, over the model that the training began with.",
        "Lost: of the prompts that the base answers right greedily, the share that the model no longer does.",
        f"Samples a prompt: {SAMPLES} on reasoning-gym and 2 on GSM8K; of what needs no training 2, and 1 of the best of 16.",
        "",
    ]
    for key, task in TASKS.items():
        own = {(row["name"], row["seed"]): row for row in rows if row["task"] == key}
        names = [name for name in task.names if any(n == name for n, _ in own)]
        if not own:
            continue
        seeds = sorted({seed for _, seed in own})
        command = f"python -m benchmarks.evidence.real {key}" + (f" --seeds {' '.join(map(str, seeds))}" if not task.finished else "")
        minutes = sum(row.get("seconds") or 0 for row in own.values()) / 60
        lines += [f"## {key.replace('_', '-')}", "", f"`{command}`", "", task.about, ""]
        measures = {k: m.title for k, m in task.measures.items()}
        lines += [*table(own, names, measures, partial(real_title, task), real_start), ""]
        for (name, _), row in own.items():
            if "card" in row:
                decision = row["card"]["decision"]
                chosen = ", ".join(f"{k} {v}" for k, v in decision.items() if not isinstance(v, (dict, list)))
                lines += [f"The card of `{name}`: {row['card']['verdict']} ({chosen}).", *(f"- {r}" for r in row["card"]["reasons"]), ""]
        lines += [f"Training and sampling: {minutes:.0f} minutes of one core.", ""]
    page.write_text("\n".join(lines))


def real_title(task: Task, name: str) -> str:
    return task.sft if name == "sft/light" else title(name)


def real_start(name: str) -> str:
    """The row a row is compared with. The card's run trains the recipe's SFT itself, and here began with its last checkpoint too."""
    return "sft/light" if name == "ppo/card" else start_of(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[5], help="of the data and the training; gsm8k has its recipe's alone")
    parser.add_argument("--only", nargs="+", default=None, help="names of rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence_real"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    options = parser.parse_args()
    if not options.page and not options.task:
        parser.error("which task? " + ", ".join(TASKS))
    known = TASKS[options.task].names if options.task else []
    if unknown := set(options.only or []) - set(known):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(known) or 'none without a task'}")
    results = Results(options.results)
    page = PAGE if options.results == RESULTS else options.results.with_suffix(".md")
    for seed in [] if options.page else seeds_of(TASKS[options.task], options.seeds):
        bench = Bench(options.task, seed, options.runs)
        for name in options.only or bench.task.names:
            if (options.task, name, seed) not in keys(results):
                started = time.monotonic()
                results.add([r for r in tagged(bench.rows(name), options.task) if (options.task, r["name"], seed) not in keys(results)])
                print(f"{options.task}, seed {seed}: {name}; {time.monotonic() - started:.0f} s", flush=True)
    write_page(results.every(), page)
    print(f"{page} is written")


def seeds_of(task: Task, wanted: list[int]) -> list[int]:
    """Those wanted, or that of the finished run."""
    return [json.loads((ROOT / task.finished / "summary.json").read_text())["seed"]] if task.finished else wanted


def keys(results: Results) -> set[tuple[str, str, int]]:
    return {(row["task"], row["name"], row["seed"]) for row in results.every()}


if __name__ == "__main__":
    main()
