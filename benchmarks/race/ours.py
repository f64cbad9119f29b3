"""Our side of a race: PPO through the public `run_ppo` on a recipe, as a user runs it.

Baseline, diagnosis, guard, evaluation and checkpoints on the way are off: the other side has none of them.
Before anything is measured the whole job runs once on a tiny model, so that libraries loaded late count for neither side.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.race.job import KL_COEF, LAMBDA, LEARNING_RATE, Clock, Job
from benchmarks.race.measured import Measured
from benchmarks.race.shapes import SHAPES, Shape

from srppo.profiling.memory import resident

OPTIONS: dict[str, dict[str, Any]] = {  # of ours, by the name that follows the tuning in Job.tuning
    "": {},
    "compile": {"model.compile": True},
    "least_squares": {"tuning.critic": "least_squares"},
    "tokens512": {"ppo.micro_batch_tokens": 512},
    "checkpointing": {"model.gradient_checkpointing": True},
    "frozen16": {"model.frozen_dtype": "bfloat16"},
    "autocast": {"model.autocast": "bfloat16"},
    "apart": {"rollout.merge_adapters": False},
    "recompute": {"ppo.behaviour_logprobs": "recompute"},
    "entropy": {"ppo.entropy": True},
    "liger": {"model.kernels": "liger"},
}
UNCLIPPED = 1e9  # max_grad_norm: TRL's PPO never clips


def recipe(shape: Shape, tuning: str, materials: Path, output: Path, updates: int, job: Job) -> dict[str, Any]:
    """Values for config.build that mean the same work as the other side's settings."""
    group = shape.samples > 1
    tuning, _, option = tuning.partition("_")
    values: dict[str, Any] = {
        "output": str(output),
        "seed": job.seed,
        "threads": 1 if job.device == "cpu" else None,
        "model": {
            "name": str(materials / "base"),
            "device": job.device,
            "autocast": "bfloat16" if job.autocast else "none",
            "dtype": "float32" if tuning == "full" else job.frozen,  # of the base, where adapters learn
            "frozen_dtype": job.frozen,
        },
        "tuning": {"kind": tuning, "lora_rank": shape.rank, "lora_alpha": 2.0 * shape.rank, "critic": "own"},
        "data": {
            "demonstrations": str(materials / "demonstrations.jsonl"),
            "prompts": str(materials / "prompts.jsonl"),
            "heldout": 0,
            "max_prompt_tokens": shape.prompt,
            "max_tokens": shape.prompt + shape.response,
        },
        "sft": {"checkpoint": str(materials / ("sft" if tuning == "full" else "sft_adapter"))},
        "reward": {"checkpoint": "sft", "placement": "eos", "kl_anchor": "sft", "kl_coef": KL_COEF, "missing_eos": "keep"},
        "rollout": {"max_new_tokens": shape.response, "batch_size": shape.batch},
        "ppo": {
            "iterations": updates,
            "prompts_per_iteration": shape.batch // shape.samples,
            "samples_per_prompt": shape.samples,
            "baseline": "group" if group else "critic",
            "epochs": shape.epochs,
            "minibatches": shape.minibatches,
            "learning_rate": LEARNING_RATE,
            "critic_learning_rate": LEARNING_RATE,
            "lr_schedule": "linear",
            "gae_lambda": LAMBDA,
            "critic_warmup": 0,
            "max_grad_norm": UNCLIPPED,
            "checkpoint_every": 0,
        },
        "diagnose": {"enabled": False},
        "guard": {"every": 0},
        "evaluation": {"scorer": "none", "continued_sft": False},
    }
    for key, value in OPTIONS[option].items():
        section, name = key.split(".")
        values[section][name] = value
    return values


class TimedProgress:
    """Says nothing; marks the clock when the PPO rounds begin and after each."""

    def __init__(self, clock: Clock, device: str = "cpu"):
        self.clock, self.warnings = clock, list[str]()
        self.device, self.peak = device, 0.0
        self.gpu_peak: float | None = None  # MiB, as the other

    @contextlib.contextmanager
    def stage(self, title: str, total: int, unit: str, start: int = 0) -> Iterator[Any]:
        timed = title == "PPO"
        progress = self

        class Ticks:
            def advance(self, done: int, **metrics: float) -> None:
                if timed:
                    progress.clock.mark()
                    progress.look()

        if timed:
            self.clock.mark()
        yield Ticks()

    def look(self) -> None:
        """Note the peaks so far."""
        import torch

        from srppo.profiling.memory import of_device

        self.peak = resident().so_far()[""]
        if self.device != "cpu":
            self.gpu_peak = of_device(torch.device(self.device)).so_far()[""]

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...


def align_once(values: dict[str, Any]) -> TimedProgress:
    """One run of PPO."""
    from srppo.config import build
    from srppo.job import run_ppo

    shutil.rmtree(values["output"], ignore_errors=True)
    progress = TimedProgress(Clock(), values["model"]["device"])
    run_ppo(build(values), progress=progress)
    return progress


def forget_peaks(device: str) -> None:
    """Let the peaks that srppo remembers begin anew: its phases reset the system's own, so only srppo knows a whole run's."""
    import torch

    from srppo.profiling.memory import of_device

    for peaks in {resident(), of_device(torch.device(device))}:
        peaks.so_far()
        peaks.highest.clear()


def main() -> None:
    job = Job.load(sys.argv[1])
    work = Path(job.work)
    tiny = SHAPES["tiny"].changed(samples=min(2, job.shape.samples))
    align_once(recipe(tiny, job.tuning, Path(job.warmup), work / "warmup", 1, job))
    measured = Measured(job)
    forget_peaks(job.device)
    output = work / "run"
    progress = align_once(recipe(job.shape, job.tuning, Path(job.materials), output, job.updates, job))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if row.get("stage") == "ppo" and "iteration" in row]
    answer = {
        "system": "srppo",
        **progress.clock.rounds(),
        "phases": {name: [row[f"timing/{name}"] for row in rounds] for name in ("rollout", "score", "update")},
        "scores": [row["objective/scores"] for row in rounds],
        "scores_std": [row["objective/scores_std"] for row in rounds],
        "kl": [row["objective/kl"] for row in rounds],
        "responses": [job.shape.batch] * len(rounds),
        "response_tokens": [round(row["completions/mean_length"] * job.shape.batch) for row in rounds],
        "rss_peak_with_saving_mb": resident().so_far()[""],
        "warnings": progress.warnings,
    }
    measured.answer(answer, progress.peak, progress.gpu_peak)


if __name__ == "__main__":
    main()
