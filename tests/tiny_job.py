"""A whole job small enough for tests: a tiny random model, two dozen demonstrations, a few rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import srppo
from srppo.config import RunConfig, build, merge
from srppo.progress import make_progress
from srppo.train.interrupt import Interrupt
from tiny_models import save_tiny


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tiny_job(folder: Path, architecture: str = "llama", kind: str = "full", **changes: Any) -> RunConfig:
    """A configuration whose files lie in `folder`. changes: dotted keys with `__` for the dot."""
    model = folder / architecture
    if not model.exists():
        save_tiny(model, architecture)
    demonstrations = [{"prompt": f"say {i}:", "completion": f" {i}{i}"} for i in range(20)]
    values: dict[str, Any] = {
        "output": str(folder / "run"),
        "threads": 1,
        "model": {"name": str(model)},
        "tuning": {"kind": kind, "lora_rank": 4},
        "data": {
            "demonstrations": write_rows(folder / "demonstrations.jsonl", demonstrations),
            "prompts": write_rows(folder / "prompts.jsonl", [{"prompt": f"say {i}?"} for i in range(20)]),
            "heldout": 4,
        },
        "sft": {"steps": 3, "learning_rate": 1e-2, "batch_size": 8, "micro_batch_tokens": 64, "checkpoints_at": [0.5, 1.0]},
        "rollout": {"max_new_tokens": 8},
        "ppo": {
            "iterations": 3,
            "prompts_per_iteration": 6,
            "samples_per_prompt": 2,
            "epochs": 2,
            "minibatches": 2,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "checkpoint_every": 1,
        },
    }
    return build(merge(values, {name.replace("__", "."): value for name, value in changes.items()}))


class StopAt(Interrupt):
    """Asks for a stop at its n-th safe point, as Ctrl-C would."""

    def __init__(self, at: float):
        super().__init__()
        self.left = at

    def check(self) -> None:
        self.poll()

    def poll(self, *_: object) -> None:
        self.left -= 1
        self.requested = self.left <= 0
        super().poll()


def run(config: Any, **options: Any) -> dict[str, Any]:
    return srppo.align(config, progress=make_progress("quiet"), **options)


def metrics(folder: str | Path, stage: str = "ppo") -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["stage"] == stage and ("iteration" in r or "loss" in r)]


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in r.items() if not k.startswith(("timing/", "memory/")) and "tokens_per_second" not in k and k != "time"}
        for r in records
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(f for f in folder.glob("*.safetensors") if "value_head" not in f.name))
