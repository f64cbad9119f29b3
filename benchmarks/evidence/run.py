"""Running one training on one seed, and the rows it gives. Everything is kept in run folders, so that what is finished is not run again."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.evidence.cases import FREE, PPOS, ROUNDS, SFTS
from benchmarks.evidence.free import judge
from benchmarks.evidence.rewardmodel import make_pairs, train_reward_model

from srppo.config import RunConfig, build, merge
from srppo.evaluate import Answers
from srppo.files import read_lines
from srppo.job import align, run_ppo, run_sft
from srppo.lab.world import recipe, write_world
from srppo.progress import make_progress
from srppo.workspace import open_workspace

Row = dict[str, Any]
GROUPS = ("with_demonstrations", "without_demonstrations")
SAMPLES = 2  # a prompt and model
COMMON = {
    "ppo.iterations": ROUNDS,
    "sft.checkpoints_at": [1.0],
    "diagnose.enabled": False,
    "guard.every": 0,
    "evaluation.every": 0,
    "evaluation.samples": SAMPLES,
    "evaluation.continued_sft": False,
}


@dataclass(frozen=True)
class Results:
    """The result file: a row a line, appended under a lock, so that several processes may share the work."""

    file: Path

    def rows(self) -> dict[tuple[str, int], Row]:
        return {(row["name"], row["seed"]): row for row in self.every()}

    def every(self) -> list[Row]:
        if not self.file.is_file():
            return []
        with self.file.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            return read_lines(self.file)  # without a last line that a killed process has half written

    def add(self, rows: list[Row]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            _end_line(stream)
            stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def _end_line(stream: BinaryIO) -> None:
    """Drop a half-written last line, or end a whole one. In place: the lock is on this very file."""
    stream.seek(0)
    whole, newline, last = stream.read().rpartition(b"\n")
    if not last:
        return
    try:
        json.loads(last)
        stream.write(b"\n")
    except ValueError:
        stream.truncate(len(whole) + len(newline))


def produce(name: str, seed: int, runs: Path) -> list[Row]:
    """The rows that the training (or the sampling) behind a name gives."""
    kind, _, rest = name.partition("/")
    if kind == "free":
        return [free_row(rest, seed, runs)]
    if name == "sft/saved":
        return ppo_rows("card", seed, runs)
    if name == "base" or kind == "sft":
        return sft_rows("light" if name == "base" else rest, seed, runs)
    return ppo_rows(rest, seed, runs)


def world(seed: int, demonstrations: int, runs: Path) -> Path:
    folder = runs / str(seed) / f"world-{demonstrations}"
    if not (folder / "without.jsonl").is_file():
        write_world(folder, seed, demonstrations=demonstrations)
        rows = read_lines(folder / "prompts.jsonl")
        for part in ("with", "without"):
            kept = [row for row in rows if row["group"] == f"{part}_demonstrations"]
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


def settings(sft: str, output: Path, seed: int, runs: Path, changes: dict[str, Any]) -> RunConfig:
    place = world(seed, SFTS[sft].demonstrations, runs)
    return build(merge(recipe(place, seed, output), COMMON | SFTS[sft].changes | changes))


def sft_folder(name: str, seed: int, runs: Path) -> Path:
    """The folder of a finished SFT run."""
    folder = runs / str(seed) / f"sft-{name}"
    if not (folder / "summary.json").is_file():
        config = settings(name, folder, seed, runs, {"ppo.iterations": 0})
        run_sft(config, overwrite=folder.exists(), progress=make_progress("quiet"))
    return folder


def sft_rows(name: str, seed: int, runs: Path) -> list[Row]:
    folder = sft_folder(name, seed, runs)
    rows = [row_of(folder, "sft", f"sft/{name}", seed) | whole_run(folder)]
    return [row_of(folder, "base", "base", seed), *rows] if name == "light" else rows


def ppo_rows(name: str, seed: int, runs: Path) -> list[Row]:
    case = PPOS[name]
    folder = runs / str(seed) / f"ppo-{name}"
    extra: dict[str, Any] = {}
    own_sft = "sft.checkpoints_at" in SFTS[case.sft].changes  # the card moves its checkpoints: no SFT to share
    if not (folder / "summary.json").is_file():
        changes = dict(case.changes)
        if case.prompts != "all":
            changes["data.prompts"] = str(world(seed, SFTS[case.sft].demonstrations, runs) / f"{case.prompts}.jsonl")
        if case.numerator:
            changes["reward.checkpoint"] = str(sft_folder(case.numerator, seed, runs) / "sft")
        if case.reward_model:
            changes |= {
                "reward.kind": "preference_model",
                "reward.preference_model": str(reward_model(case.reward_model, seed, runs) / "model"),
            }
        if case.after:
            changes["sft.checkpoint"] = str(continued_folder(case.after, seed, runs))
        elif not own_sft:
            changes["sft.checkpoint"] = str(sft_folder(case.sft, seed, runs) / "sft")
        config = settings(case.sft, folder, seed, runs, changes | {"evaluation.continued_sft": case.continued})
        (align if case.continued or own_sft else run_ppo)(config, overwrite=folder.exists(), progress=make_progress("quiet"))
        for heavy in ("checkpoints", "critic"):
            shutil.rmtree(folder / heavy, ignore_errors=True)
    if case.reward_model:
        extra["reward_model"] = json.loads((reward_model(case.reward_model, seed, runs) / "training.json").read_text())
    if (folder / "diagnose.json").is_file():
        card = json.loads((folder / "diagnose.json").read_text())
        extra["card"] = {"verdict": card["verdict"], "reasons": card["reasons"], "decision": card["decision"]}
    rows = [row_of(folder, "srppo", f"ppo/{name}", seed) | whole_run(folder) | extra]
    if own_sft:
        rows.append(row_of(folder, "sft", f"sft/{case.sft}", seed))  # the checkpoint that the card chose to start from
    if case.continued:
        rows.append(row_of(folder, "sft_continued", f"continued/{name}", seed))
    return rows


def continued_folder(name: str, seed: int, runs: Path) -> Path:
    """The weights of the SFT that was trained on beside a PPO run."""
    folder = runs / str(seed) / f"ppo-{name}"
    if not (folder / "sft_continued").is_dir():
        (folder / "summary.json").unlink(missing_ok=True)  # its weights were thrown away: again
        ppo_rows(name, seed, runs)
    return folder / "sft_continued"


def reward_model(prompts: str, seed: int, runs: Path) -> Path:
    """The folder of a reward model whose preferences are on prompts of "all" families, or of those "with" demonstrations."""
    folder = runs / str(seed) / f"reward-model-{prompts}"
    if not (folder / "training.json").is_file():
        sft = sft_folder("light", seed, runs) / "sft"
        changes = {"sft.checkpoint": str(sft)}
        if prompts != "all":
            changes["data.prompts"] = str(world(seed, SFTS["light"].demonstrations, runs) / f"{prompts}.jsonl")
        config = settings("light", runs / str(seed) / "pairs", seed, runs, changes)
        with open_workspace(config, make_progress("quiet"), overwrite=Path(config.output).exists()) as space:
            pairs = make_pairs(space, seed)
            space.loaded.roles.tokenizer.save_pretrained(folder / "model")
        figures = train_reward_model(pairs, sft, folder / "model", seed)
        (folder / "training.json").write_text(json.dumps(figures))
    return folder


def free_row(name: str, seed: int, runs: Path) -> Row:
    case, started = FREE[name], time.monotonic()
    sft = sft_folder("light", seed, runs) / "sft"
    config = settings("light", runs / str(seed) / f"free-{name}", seed, runs, {"sft.checkpoint": str(sft)})
    with open_workspace(config, make_progress("quiet"), overwrite=Path(config.output).exists()) as space:
        found = judge(space, case, SAMPLES)
    shutil.rmtree(config.output, ignore_errors=True)
    groups = {name: answers_row(found.rows, found.to_dict()[name], name) for name in GROUPS}
    return {"name": f"free/{name}", "seed": seed, "groups": groups, "wall_seconds": time.monotonic() - started}


def whole_run(folder: Path) -> Row:
    """How long the run took that a row is of, evaluation and all; rows of its other stages do not count it again."""
    return {"wall_seconds": json.loads((folder / "summary.json").read_text())["wall_seconds"]}


def row_of(folder: Path, stage: str, name: str, seed: int) -> Row:
    """What the tables need of a stage of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    answers = [Answers(**row) for row in read_lines(folder / f"evaluation/{stage}.jsonl")]
    trained = {"srppo": "ppo", "base": ""}.get(stage, stage)
    row: Row = {
        "name": name,
        "seed": seed,
        "groups": {g: answers_row(answers, summary[stage][g], g) for g in GROUPS},
        "heldout_nll": summary["heldout_nll"].get(stage),
        "passes": (summary["compute"].get(trained) or {}).get("passes"),
        "seconds": summary["stage_seconds"].get(trained),
    }
    if stage == "srppo":
        records = [r for r in read_lines(folder / "metrics.jsonl") if r["stage"] == "ppo" and "iteration" in r]
        wanted = {"length": "completions/mean_length", "reward": "objective/scores", "kl": "objective/kl_sft"}
        row["curves"] = {short: [round(r[key], 4) for r in records] for short, key in wanted.items()}
        row["training"] = {k: summary["ppo_training"].get(k) for k in ("final_beta", "kept_round", "rounds", "stopped_early")}
    return row


def answers_row(answers: list[Answers], result: dict[str, Any], group: str) -> dict[str, Any]:
    """Right answers prompt by prompt, as digits: of the samples (0 to SAMPLES), and of the greedy answer (0 or 1)."""
    own = sorted((a for a in answers if a.group == group), key=lambda a: a.row)
    return {
        "right": "".join(str(round(sum(a.sampled_scores or []))) for a in own),
        "greedy": "".join(str(round(a.greedy_score or 0)) for a in own),
        "samples": result["samples"],
        "length": round(result["mean_length"], 4),
        "ends": round(result["eos_rate"], 4),
    }
