"""Files and recipe of the embedded world: demonstrations of four families, prompts of ten, evaluation rows of ten, none in two files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from srppo.errors import ModelError, SrppoError
from srppo.lab.tasks import DEMONSTRATED, FAMILIES, answer_text, prompt_text, random_word
from srppo.seeding import stream_seed

WITH, WITHOUT = "with_demonstrations", "without_demonstrations"
HELDOUT_DEMONSTRATIONS = 16
"""Written beside the training demonstrations, for the held-out loss (recipe: data.heldout)."""

Strength = Literal["light", "heavy"]


def base_folder() -> Path:
    """The pretrained base model that ships with the package, a Hugging Face folder. Raises ModelError where the installation lacks it."""
    folder = Path(str(resources.files("srppo.lab") / "assets"))
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"{folder}: the embedded base model is missing; reinstall srppo, or remake it with `srppo lab pretrain`")
    return folder


def group_of(family: str) -> str:
    """The evaluation group of a family."""
    return WITH if family in DEMONSTRATED else WITHOUT


def write_world(folder: str | Path, seed: int, demonstrations: int = 64, prompts: int = 1600, eval_per_family: int = 40) -> dict[str, Path]:
    """Write demonstrations.jsonl, prompts.jsonl and eval.jsonl into `folder` (made if need be) and return their paths by stem.

    demonstrations.jsonl: {"prompt", "completion", "group", "family"}, demonstrated families in turn; `demonstrations` to train on plus
    HELDOUT_DEMONSTRATIONS. prompts.jsonl and eval.jsonl: {"prompt", "answer", "group", "family"}, all families in turn (answers are for
    scoring and never shown to training). No prompt occurs twice, in one file or in two. Deterministic for a seed, whatever the sizes of
    the other files: each file has its own random stream, and evaluation rows are drawn first.
    Raises SrppoError where `folder` cannot be written.
    """
    folder, seen = Path(folder), set[str]()
    everything, shown = list(FAMILIES), list(DEMONSTRATED)
    rows = {
        "eval": _draw(everything, eval_per_family * len(everything), seen, seed, "eval"),
        "demonstrations": _draw(shown, demonstrations + HELDOUT_DEMONSTRATIONS, seen, seed, "demonstrations"),
        "prompts": _draw(everything, prompts, seen, seed, "prompts"),
    }
    for row in rows["demonstrations"]:
        row["completion"] = row.pop("answer")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return {stem: _write_jsonl(folder / f"{stem}.jsonl", content) for stem, content in rows.items()}
    except OSError as error:
        raise SrppoError(f"{folder}: the world's files cannot be written: {error.strerror or error}; choose another folder") from None


def _draw(families: Sequence[str], count: int, seen: set[str], seed: int, purpose: str) -> list[dict[str, str]]:
    """`count` rows, families in turn, none of whose prompts is in `seen`; puts theirs there."""
    rng, rows = random.Random(stream_seed(seed, "lab", purpose)), list[dict[str, str]]()
    while len(rows) < count:
        family, word = families[len(rows) % len(families)], random_word(rng)
        prompt = prompt_text(family, word)
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "answer": answer_text(family, word), "group": group_of(family), "family": family})
    return rows


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(folder: str | Path, seed: int, output: str | Path = "runs/demo", strength: Strength = "light") -> dict[str, Any]:
    """Values for config.build: the demo on a world written to `folder`. docs/lab.md says how each was found.

    strength "light" is the demo's SFT; "heavy" overfits the demonstrations on purpose, to show the reward turn against correctness.
    """
    folder = Path(folder)
    sft = {"light": {"steps": 15, "learning_rate": 1e-4}, "heavy": {"steps": 60, "learning_rate": 3e-4}}[strength]
    return {
        "output": str(output),
        "seed": seed,
        "threads": 1,  # matrices this small gain nothing from a second thread, and on a busy machine they lose
        "model": {"name": str(base_folder()), "device": "cpu"},
        "data": {
            "demonstrations": str(folder / "demonstrations.jsonl"),
            "prompts": str(folder / "prompts.jsonl"),
            "heldout": HELDOUT_DEMONSTRATIONS,
            "max_prompt_tokens": 32,
            "max_tokens": 64,
        },
        "sft": {
            **sft,
            "batch_size": 64,  # all demonstrations in every step
            "keep": "last",  # so few steps have no better checkpoint on the way
        },
        "reward": {
            "checkpoint": "sft",  # the paper's
            "placement": "eos",  # the paper's
            "kl_anchor": "sft",
            "kl_coef": 1.0,  # the optimum squares the SFT odds; reweighted samples are right most often at .7 to 1
        },
        "rollout": {
            "max_new_tokens": 24,  # right answers have at most 9 tokens; ramblers go on
            "batch_size": 256,
        },
        "ppo": {
            "iterations": 25,  # accuracy without demonstrations levels off after 15 to 20
            "prompts_per_iteration": 128,  # 25 rounds take two passes over the 1600 prompts
            "samples_per_prompt": 1,
            "epochs": 4,
            "minibatches": 4,
            "learning_rate": 1e-4,  # as the SFT's: clip fraction .03 to .07, KL .2 to .6 nats a response
            "critic_learning_rate": 3e-4,  # its head starts from nothing and has 25 rounds to learn
            "checkpoint_every": 0,  # a run of two minutes needs no more than the last state
        },
        "diagnose": {"on_no_go": "warn"},  # a demonstration goes on, and shows what the card foretold
        "guard": {"keep": "last", "stop": False},  # it watches only: the table shows what 25 rounds do
        "evaluation": {
            "prompts": str(folder / "eval.jsonl"),
            "scorer": "exact_match",
            "samples": 4,
            "every": 5,
            "during_prompts": 32,
            "batch_size": 512,
        },
    }
