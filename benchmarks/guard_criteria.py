"""By what should the guard choose? In the lab, runs without it are watched, and each rule's choice is judged by true accuracy.

python benchmarks/guard_criteria.py --seeds 310 311 312 313 --runs runs/guard_criteria

Every third round: accuracy of one sample on 400 prompts, and the log-probability of each held-out demonstration's tokens. Rules are
then tried on the record, which lies in benchmarks/results/guard_criteria.jsonl (a line a run; finished runs are not run again). Writes
docs/results/guard_criteria.md. `--real FOLDER …` measures the criteria on finished runs of real models first, before and after PPO
(benchmarks/results/guard_criteria_real.json), as in: --real runs/reasoning_gym_seeds/seed-2 runs/reasoning_gym_seeds/seed-3.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from srppo.config import build, merge
from srppo.files import read_lines
from srppo.job import align
from srppo.lab.world import recipe, write_world
from srppo.models.over_rollout import role_logprobs
from srppo.models.roles import Roles
from srppo.progress import make_progress
from srppo.records import Rollout
from srppo.run_config import load_run_config
from srppo.train.checkpoint import load_checkpoint, saved_steps
from srppo.train.guard import watched
from srppo.workspace import open_workspace

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/results/guard_criteria.md"
REAL = ROOT / "benchmarks/results/guard_criteria_real.json"
RESULTS = ROOT / "benchmarks/results/guard_criteria.jsonl"
GROUPS = ("with_demonstrations", "without_demonstrations")
SFTS = {"light": (15, 1e-4), "medium": (60, 1e-4), "heavy": (60, 3e-4)}
SETTINGS = [("light", 1.0), ("light", 0.3), ("medium", 1.0), ("heavy", 1.0), ("heavy", 0.3)]
EVERY, ROUNDS = 3, 15
Record = list[dict[str, Any]]  # of a run: a dict a look, the first at the SFT
Rule = Callable[[Record], int]  # the look it keeps


def watch(seed: int, strength: str, beta: float, runs: Path) -> Record:
    """Run PPO to its end and return what was seen on the way."""
    world, folder = runs / f"world-{seed}", runs / f"{seed}-{strength}-{beta:g}"
    if not (world / "eval.jsonl").is_file():
        write_world(world, seed)
    steps, rate = SFTS[strength]
    changes = {
        "sft.steps": steps,
        "sft.learning_rate": rate,
        "reward.kl_coef": beta,
        "ppo.iterations": ROUNDS,
        "diagnose.enabled": False,
        "guard.every": 0,
        "ppo.checkpoint_every": EVERY,
        "ppo.keep_checkpoints": ROUNDS // EVERY,
        "evaluation.every": EVERY,
        "evaluation.during_prompts": 1000,  # all
        "evaluation.samples": 1,
        "evaluation.continued_sft": False,
    }
    config = build(merge(recipe(world, seed, folder), changes))
    summary = align(config, overwrite=folder.exists(), progress=make_progress("quiet"))
    states = folder / "checkpoints/ppo"
    with open_workspace(config, make_progress("quiet"), resume=True) as space:
        roles, at_once = space.loaded.roles, config.ppo.micro_batch_tokens
        roles.load("sft", folder / "sft")
        roles.create("policy", "sft")
        demonstrations = watched(space.loaded.demonstrations.heldout, roles, config)
        said = [tokens(roles, "sft", demonstrations, at_once)]
        for step in saved_steps(states):
            roles.load_state("policy", load_checkpoint(states, step).tensors["policy"])
            said.append(tokens(roles, "policy", demonstrations, at_once))
    middle = {r["iteration"]: r for r in read_lines(folder / "metrics.jsonl") if r.get("stage") == "ppo" and "iteration" in r}
    accuracy = [{g: summary["sft"][g]["sampled"] for g in GROUPS}]
    accuracy += [{g: middle[i][f"eval/{g}/sampled"] for g in GROUPS} for i in range(EVERY, ROUNDS, EVERY)]
    accuracy.append({g: summary["srppo"][g]["sampled"] for g in GROUPS})
    return [{"accuracy": a, "demonstrations": d} for a, d in zip(accuracy, said, strict=True)]


def tokens(roles: Roles, role: str, demonstrations: Rollout, at_once: int) -> list[list[float]]:
    """Log-probabilities of each demonstration's tokens. at_once: tokens in memory at once."""
    return [row[mask].tolist() for row, mask in zip(role_logprobs(roles, role, demonstrations, at_once), demonstrations.mask)]


def real(folder: Path) -> dict[str, Any]:
    """The criteria before and after PPO on the held-out demonstrations of a finished run, and its accuracy."""
    with open_workspace(load_run_config(folder, print), make_progress("quiet"), resume=True) as space:
        roles, config = space.loaded.roles, space.config
        roles.load("sft", folder / "sft")
        roles.load("policy", folder / "policy")
        demonstrations, at_once = watched(space.loaded.demonstrations.heldout, roles, config), config.ppo.micro_batch_tokens
        looks = {role: {"demonstrations": tokens(roles, role, demonstrations, at_once)} for role in ("sft", "policy")}
    gain = json.loads((folder / "summary.json").read_text())["srppo_gain"]["sft"]
    changes = {name: float((f(looks["policy"]) - f(looks["sft"])).mean()) for name, f in CRITERIA.items()}
    return {"run": folder.name, "changes": changes, "gain": {g: gain[g]["gain"] for g in GROUPS}}


def responses(look: dict[str, Any]) -> np.ndarray:
    """[demonstrations] log-probability of each."""
    return np.array([sum(tokens) for tokens in look["demonstrations"]])


def loglikelihood(look: dict[str, Any]) -> np.ndarray:
    return responses(look)


def probability(look: dict[str, Any]) -> np.ndarray:
    """[demonstrations] of the whole demonstration: how often the policy would say it."""
    return np.exp(responses(look))


def inverse_perplexity(look: dict[str, Any]) -> np.ndarray:
    return np.exp([np.mean(tokens) for tokens in look["demonstrations"]])


def token_probability(look: dict[str, Any]) -> np.ndarray:
    return np.array([np.mean(np.exp(tokens)) for tokens in look["demonstrations"]])


CRITERIA = {f.__name__: f for f in (loglikelihood, probability, inverse_perplexity, token_probability)}


def best(criterion: Callable[[dict[str, Any]], np.ndarray]) -> Rule:
    return lambda record: int(np.argmax([criterion(look).mean() for look in record]))


def latest_not_worse(criterion: Callable[[dict[str, Any]], np.ndarray], errors: float) -> Rule:
    """The last look that is not worse than the best by more than `errors` standard errors of the paired difference."""

    def rule(record: Record) -> int:
        values = [criterion(look) for look in record]
        top = int(np.argmax([v.mean() for v in values]))
        gaps = [values[top] - v for v in values]
        fine = [i for i, g in enumerate(gaps) if g.mean() <= errors * g.std(ddof=1) / np.sqrt(len(g))]
        return max([*fine, top])

    return rule


RULES: dict[str, Rule] = {
    "no guard": lambda record: len(record) - 1,
    "the SFT": lambda record: 0,
    **{f"best {name}": best(f) for name, f in CRITERIA.items()},
    **{f"latest within {k:g} errors, {name}": latest_not_worse(f, k) for name, f in CRITERIA.items() for k in (1.0, 2.0)},
    "hindsight": lambda record: int(np.argmax([look["accuracy"][GROUPS[1]] for look in record])),
}


def table(runs: list[dict[str, Any]]) -> str:
    """Mean change of accuracy from the SFT by setting (both groups), and the worst run without demonstrations."""
    settings = [(s, b) for s, b in SETTINGS if any(r["strength"] == s and r["beta"] == b for r in runs)]
    lines = ["| rule | " + " | ".join(f"{s}, β {b:g}" for s, b in settings) + " | mean | worst run |", "|---" * (len(settings) + 3) + "|"]
    for name, rule in RULES.items():
        cells, every = [], []
        for strength, beta in settings:
            gains = []
            for run in runs:
                if (run["strength"], run["beta"]) == (strength, beta):
                    kept, start = run["record"][rule(run["record"])]["accuracy"], run["record"][0]["accuracy"]
                    gains.append([100 * (kept[g] - start[g]) for g in GROUPS])
            cells.append(" / ".join(f"{x:+.1f}" for x in np.mean(gains, 0)))
            every += gains
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {np.mean(every):+.1f} | {np.min(np.array(every)[:, 1]):+.1f} |")
    return "\n".join(lines).replace("-0.0", "0.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[310, 311, 312, 313])
    parser.add_argument("--runs", type=Path, default=Path("runs/guard_criteria"))
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="run folders to measure the criteria on")
    options = parser.parse_args()
    if options.real:
        REAL.write_text(json.dumps([real(folder) for folder in options.real], indent=1) + "\n")
    for seed in options.seeds:
        for strength, beta in SETTINGS:
            rows = read_lines(RESULTS) if RESULTS.is_file() else []
            if any((r["seed"], r["strength"], r["beta"]) == (seed, strength, beta) for r in rows):
                continue
            record = watch(seed, strength, beta, options.runs)
            with RESULTS.open("a") as stream:
                stream.write(json.dumps({"seed": seed, "strength": strength, "beta": beta, "record": record}) + "\n")
            print(seed, strength, beta, [round(look["accuracy"][GROUPS[1]], 3) for look in record], flush=True)
    PAGE.write_text(page([r for r in read_lines(RESULTS) if r["seed"] in options.seeds]))


def page(runs: list[dict[str, Any]]) -> str:
    seeds = sorted({r["seed"] for r in runs})
    return "\n".join(
        [
            "# By what the guard chooses",
            "",
            f"`python benchmarks/guard_criteria.py`: {len(runs)} runs of {ROUNDS} rounds in the embedded world, seeds",
            f"{', '.join(map(str, seeds))}, 16 held-out demonstrations, a look every {EVERY} rounds.",
            "Change of sampled accuracy from the SFT to the",
            "policy that a rule keeps, with / without demonstrations, points, mean over seeds; then the mean over all, and the worst run",
            "without demonstrations. `best …`: the look with the highest mean over demonstrations. `latest within k errors`: the last look",
            "not worse than the best by more than k standard errors of the paired difference. `hindsight`: the look that was best without",
            "demonstrations, which no rule can know.",
            "",
            table(runs),
            "",
            "The guard goes by `best token_probability`.",
            "",
            *real_table(),
            "",
        ]
    )


def real_table() -> list[str]:
    """What the criteria would have said of real runs; empty where none was measured."""
    if not REAL.is_file():
        return []
    measured = json.loads(REAL.read_text())
    agree = {n: sum(np.sign(row["changes"][n]) == np.sign(row["gain"][GROUPS[0]]) for row in measured) for n in CRITERIA}
    lines = [
        "On a real model (SmolLM2-135M-Instruct, the reasoning-gym recipe's runs, 12 held-out demonstrations each, which are few): the",
        "criteria after PPO minus those of the SFT, and the change of sampled accuracy with / without demonstrations, points. Of the same",
        f"sign as the change with demonstrations, of {len(measured)} runs: {', '.join(f'{n} {k}' for n, k in agree.items())}.",
        "",
        f"| run | {' | '.join(CRITERIA)} | accuracy |",
        "|---" * (len(CRITERIA) + 2) + "|",
    ]
    for row in measured:
        cells = " | ".join(f"{row['changes'][name]:+.3f}" for name in CRITERIA)
        lines.append(f"| {row['run']} | {cells} | " + " / ".join(f"{100 * row['gain'][g]:+.1f}" for g in GROUPS) + " |")
    return lines


if __name__ == "__main__":
    main()
