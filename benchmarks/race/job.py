"""What one side of a race is told, what it answers, and how it is started: python -m benchmarks.race.SIDE JOB.json RESULT.json"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.race.shapes import Shape

ROOT = Path(__file__).resolve().parents[2]
LEARNING_RATE = 1e-5
KL_COEF = 0.05
LAMBDA = 0.95


@dataclass(frozen=True)
class Job:
    """A side's task."""

    shape: Shape
    tuning: str  # full, lora; TRL's side also full_thrifty and lora_thrifty, see trl_ppo
    updates: int
    materials: str  # folder of write_materials
    warmup: str  # materials of the tiny shape, on which the side runs once before anything is measured
    work: str  # folder for what the side leaves
    device: str = "cpu"
    autocast: bool = False  # matrix products in bfloat16
    frozen: str = "float32"  # precision of the weights that are not trained
    seed: int = 0

    @staticmethod
    def load(path: str | Path) -> Job:
        values = json.loads(Path(path).read_text())
        return Job(shape=Shape.of(values.pop("shape")), **values)


@dataclass
class Clock:
    """Wall and processor seconds between marks: one mark at the start, one after each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def mark(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def rounds(self) -> dict[str, list[float]]:
        return {
            "seconds": [b - a for a, b in zip(self.wall, self.wall[1:])],
            "cpu_seconds": [b - a for a, b in zip(self.cpu, self.cpu[1:])],
        }


class StepCount:
    """Optimizer steps of this process, and the weights they moved, counted by PyTorch's own hook for all optimizers."""

    def __init__(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.steps, self.weights = 0, 0
        self._hook = register_optimizer_step_post_hook(self._count)

    def _count(self, optimizer: Any, *_: Any) -> None:
        self.steps += 1
        self.weights += sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.grad is not None)

    def remove(self) -> dict[str, int]:
        self._hook.remove()
        return {"optimizer_steps": self.steps, "weights_moved": self.weights}


def run_side(side: str, job: Job, extra_path: str | None = None, timeout: float | None = None) -> dict[str, Any]:
    """Run one side of a race and return its answer; see `answer_of`."""
    return answer_of(side, asdict(job), Path(job.work), job.device, extra_path, timeout)


def answer_of(
    module: str, told: dict[str, Any], work: Path, device: str = "cpu", extra_path: str | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """Run a module of this folder in a process of its own: one thread on a CPU, nothing fetched. Returns what it wrote.

    extra_path: put before PYTHONPATH (another TRL). Raises RuntimeError with the end of its output if it fails, and
    subprocess.TimeoutExpired after `timeout` seconds.
    """
    work.mkdir(parents=True, exist_ok=True)
    question, said = work / "job.json", work / "result.json"
    said.unlink(missing_ok=True)
    question.write_text(json.dumps(told, indent=1))
    paths = [extra_path, str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {}
    environment = os.environ | threads
    environment |= {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, "-m", f"benchmarks.race.{module}", str(question), str(said)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=timeout)
    output = done.stdout + done.stderr
    (work / "output.txt").write_text(output)
    if done.returncode or not said.is_file():
        raise RuntimeError(f"{module} failed ({done.returncode}); all it said is in {work / 'output.txt'}, which ends:\n{output[-3000:]}")
    return json.loads(said.read_text())
