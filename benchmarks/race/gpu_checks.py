"""Is the device right, and how fast can it be? python -m benchmarks.race.gpu_checks JOB.json RESULT.json

Right: log-probabilities on the device, in float32 and with bfloat16 products, against float32 on the CPU, on responses that the CPU
sampled; and what the engine says of its own samples on the device against the scorer there.
Fast: matrix products (bfloat16, the best of large squares) and memory bandwidth (a copy), measured.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.race.job import Job
from benchmarks.race.materials import prompt_ids
from benchmarks.race.matmul import best_rate
from benchmarks.race.ours import recipe

from srppo.config import build, merge
from srppo.models.over_rollout import role_logprobs
from srppo.models.roles import Roles, build_roles
from srppo.records import Rollout
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine

ROWS, TOKENS = 8, 24
# How far apart log-probabilities of a token may be, nats: (mean, largest). float32 sums differ in order, bfloat16 keeps 8 bits.
ALLOWED = {"float32": (1e-4, 2e-3), "bfloat16": (2e-2, 3e-1), "engine float32": (1e-4, 2e-3), "engine bfloat16": (2e-2, 3e-1)}
SQUARES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512)}
COPY_BYTES = {"cuda": 2**32, "cpu": 2**26}


def roles_on(job: Job, device: str, autocast: str) -> Roles:
    values = recipe(job.shape, "full", Path(job.materials), Path(job.work) / "unused", 1, job)
    return build_roles(build(merge(values, {"model.device": device, "model.autocast": autocast, "model.frozen_dtype": "float32"})))


def sampled(roles: Roles, job: Job, autocast: str) -> Rollout:
    """Responses of the base to a few prompts."""
    engine = TorchEngine(roles.special, ROWS, autocast)
    with roles.use("base") as model:
        return engine.generate(model, prompt_ids(job.shape, ROWS), list(range(ROWS)), Sampling(min(TOKENS, job.shape.response)))


def apart(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor, name: str) -> dict[str, Any]:
    """Mean and largest absolute difference over the mask, nats a token."""
    gap = (a.float() - b.float()).abs()[mask]
    mean, largest = float(gap.mean()), float(gap.max())
    return {"mean": mean, "largest": largest, "allowed": ALLOWED[name], "right": mean <= ALLOWED[name][0] and largest <= ALLOWED[name][1]}


def correctness(job: Job) -> dict[str, Any]:
    """The comparisons by name."""
    reference = roles_on(job, "cpu", "none")
    rollout = sampled(reference, job, "none")
    truth = role_logprobs(reference, "base", rollout, 2048)
    out = {}
    for name, autocast in (("float32", "none"), ("bfloat16", "bfloat16")):
        roles = roles_on(job, job.device, autocast)
        out[name] = apart(role_logprobs(roles, "base", rollout, 2048), truth, rollout.mask, name)
        own = sampled(roles, job, autocast)
        out[f"engine {name}"] = apart(role_logprobs(roles, "base", own, 2048), own.behaviour_logprobs, own.mask, f"engine {name}")
    return out


def speeds(device: str) -> dict[str, float]:
    """Operations a second of bfloat16 products (float32 on a CPU) and bytes a second read and written by a copy."""
    kind = "cpu" if device == "cpu" else "cuda"
    timing = {} if kind == "cpu" else {"clock": time.perf_counter, "sync": torch.cuda.synchronize}
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    best = 0.0
    for n in SQUARES[kind]:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        best = max(best, best_rate(lambda a=a, b=b: a @ b, 2.0 * n**3, 0.5, **timing))
    source = torch.empty(COPY_BYTES[kind] // 2, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {"matmul_flop_per_second": best, "bytes_per_second": best_rate(lambda: target.copy_(source), 2.0 * len(source), 0.5, **timing)}


def main() -> None:
    job = Job.load(sys.argv[1])
    answer: dict[str, Any] = {"device": "CPU" if job.device == "cpu" else torch.cuda.get_device_name(), "correctness": correctness(job)}
    if job.device != "cpu":
        answer["capability"] = list(torch.cuda.get_device_capability())
        answer["memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
        torch.cuda.empty_cache()
    answer["speeds"] = speeds(job.device)
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
