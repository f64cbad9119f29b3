"""vLLM on a CPU beside the torch engine: tokens a second, seconds a sync, and how far log-probabilities are from the trainer's.

    python -m benchmarks.vllm_cpu data/smollm2 SmolLM2-135M-Instruct.Q4_1.gguf

Both engines answer the same prompts with the same limits in turn, in one process and with the same number of threads (OMP_NUM_THREADS).
Only the ratio means something on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from srppo.config import build
from srppo.models.over_rollout import role_logprobs
from srppo.models.roles import Roles, build_roles
from srppo.rollout.engine import RolloutEngine, Sampling, mismatch
from srppo.rollout.torch_engine import TorchEngine
from srppo.rollout.vllm_engine import VLLMEngine

QUESTIONS = [f"What is {a} times {b}? Explain how you found it." for a in range(3, 19) for b in (7, 12)]
CASES = ["full:float32", "lora-merged:float32", "lora-beside:float32", "full:bfloat16", "lora-merged:bfloat16", "lora-beside:bfloat16"]
RESULTS = Path(__file__).parent / "results" / "vllm_cpu.json"


def rows_of(roles: Roles, rows: int) -> list[list[int]]:
    """Prompts in the model's chat template."""
    ask = roles.tokenizer.apply_chat_template
    texts = [ask([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False) for q in QUESTIONS]
    ids = [roles.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    return [ids[i % len(ids)] for i in range(rows)]


def timed(engine: RolloutEngine, roles: Roles, role: str, prompts: list[list[int]], tokens: int, seed: int) -> tuple[float, Any]:
    """Tokens a second, and the rollout."""
    with roles.use(role) as model:
        began = time.perf_counter()
        rollout = engine.generate(model, prompts, range(seed, seed + len(prompts)), Sampling(tokens))
        return float(rollout.mask.sum()) / (time.perf_counter() - began), rollout


def measure(name: str, gguf: str | None, how: str, dtype: str, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """One tuning and precision: pairs of timings, the sync after all weights (or the adapter) changed, and the mismatch."""
    kind = how.split("-")[0]
    merge = {"lora-merged": True, "lora-beside": False}.get(how)
    model = {"name": name, "gguf_file": gguf, "device": "cpu", "dtype": dtype}
    roles = build_roles(build({"model": model, "tuning": {"kind": kind, "lora_rank": 16}}))
    roles.create("policy", "base")
    if kind == "lora":
        for parameter in (p for n, p in roles.parameters("policy").items() if "lora_B" in n):
            torch.nn.init.normal_(parameter, std=1e-3)
    prompts = rows_of(roles, rows)
    plain = TorchEngine(roles.special, rows)
    fast = VLLMEngine(roles.special, rows, lora_rank=16 if kind == "lora" else 0, merge=merge)
    for engine in (plain, fast):
        timed(engine, roles, "policy", prompts[:4], 4, 0)  # compiles and fills caches
    pairs, syncs, off = [], [], []
    for turn in range(rounds):
        ours, _ = timed(plain, roles, "policy", prompts, tokens, turn * rows)
        theirs, rollout = timed(fast, roles, "policy", prompts, tokens, turn * rows)
        pairs.append([ours, theirs])
        off.append(mismatch(rollout.behaviour_logprobs, role_logprobs(roles, "policy", rollout, 2048), rollout.mask))
        with torch.no_grad():
            for parameter in roles.parameters("policy").values():
                parameter.mul_(1.0)  # counts as a change
        with roles.use("policy") as live:
            began = time.perf_counter()
            fast._sync(live)
            syncs.append(time.perf_counter() - began)
    beside = fast._lora
    fast.close()
    return {
        "tuning": kind,
        **({"adapter": "beside" if beside else "merged"} if kind == "lora" else {}),
        "dtype": dtype,
        "rows": rows,
        "tokens": tokens,
        "tokens_per_second": {"torch": [a for a, _ in pairs], "vllm": [b for _, b in pairs]},
        "ratio_vllm_over_torch": statistics.median(b / a for a, b in pairs),
        "sync_seconds": statistics.median(syncs),
        "mismatch": {k: (max if k == "max_abs" else statistics.mean)(o[k] for o in off) for k in off[0]},
        "response_tokens": int(rollout.mask.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("gguf", nargs="?")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=CASES)
    arguments = parser.parse_args()
    cases = []
    for case in arguments.only:
        how, dtype = case.split(":")
        cases.append(measure(arguments.model, arguments.gguf, how, dtype, arguments.rows, arguments.tokens, arguments.rounds))
        print(json.dumps(cases[-1]), flush=True)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "python": platform.python_version()},
        "versions": {n: v for n in ("torch", "transformers", "peft", "vllm", "vllm-cpu") if (v := _version(n))},
        "model": Path(arguments.model).name if arguments.gguf is None else arguments.gguf,
    }
    RESULTS.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
