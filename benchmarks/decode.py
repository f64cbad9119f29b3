"""How near the torch rollout engine comes to what the machine can do, and what refilling and merged adapters give.

    python benchmarks/decode.py [--device cuda] [--quick]

Random weights, so that it needs no download; a token of a set of ids ends a row, so that lengths are about geometric.
Limits of a step of R rows, measured on the same machine just before: the bytes of all weights and of the keys and values in
use at the rate of a plain read, and the products of each linear layer at the rate of that product alone with R rows.
Seconds are CPU time on a CPU (other work on the machine then counts less), wall-clock time elsewhere.
Writes benchmarks/results/decode.json. Only the ratios carry over to another machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from srppo.models.tokens import SpecialTokens
from srppo.rollout import Sampling, TorchEngine

SHAPES: dict[str, dict[str, Any]] = {
    "llama_5m": {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "vocab_size": 4096},
    "smollm2_135m": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
SIZES = {"llama_5m": (64, 512, 64), "smollm2_135m": (32, 64, 24)}  # rows at once, rows, response limit


class Clock:
    """Seconds that a call takes."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, work: Callable[[], Any]) -> tuple[float, Any]:
        now = time.process_time if self.device.type == "cpu" else time.perf_counter
        self._wait()
        start = now()
        result = work()
        self._wait()
        return now() - start, result

    def best(self, work: Callable[[], Any], times: int = 5) -> float:
        return min(self(work)[0] for _ in range(times + 1))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def build(name: str, device: torch.device) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=True, **SHAPES[name])
    return AutoModelForCausalLM.from_config(config).to(device).eval()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 4000, (20 + i * 7 % 21,), generator=generator).tolist() for i in range(count)]


def limits(model: Any, rows: int, columns: float, clock: Clock) -> dict[str, float]:
    """Seconds a step of so many rows takes at least, by memory and by products."""
    block = torch.ones(2**26, device=clock.device)
    rate = block.numel() * 4 / clock.best(lambda: block.sum())
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    states = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4 * columns * rows
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    products = 0.0
    seen: dict[tuple[int, ...], float] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            if tuple(layer.weight.shape) not in seen:
                x = torch.randn(rows, layer.in_features, device=clock.device)
                seen[tuple(layer.weight.shape)] = clock.best(partial(nn.functional.linear, x, layer.weight))
            products += seen[tuple(layer.weight.shape)]
    return {"memory": (weights + states) / rate, "products": products}


def timed(model: Any, name: str, ends: SpecialTokens, sizes: tuple[int, int, int], clock: Clock, **options: Any) -> dict[str, float]:
    rows, count, limit = sizes
    engine = TorchEngine(ends, rows, **options)
    seconds, rollout = clock(lambda: engine.generate(model, prompts(count), range(count), Sampling(limit)))
    tokens = int(rollout.mask.sum())
    return {"tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds, "idle_share": engine.last.idle_share}


def alternately(runs: dict[str, Callable[[], dict[str, float]]], times: int) -> dict[str, dict[str, float]]:
    """The fastest of several runs of each, taken in turns, so that what else the machine does meets all alike."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(times):
        for name, run in runs.items():
            result = run()
            if name not in best or result["seconds"] < best[name]["seconds"]:
                best[name] = result
    return best


def measure(name: str, device: torch.device, times: int) -> dict[str, Any]:
    clock, model, sizes = Clock(device), build(name, device), SIZES[name]
    rows, _, limit = sizes
    vocabulary = model.config.vocab_size
    ending = SpecialTokens(0, tuple(range(vocabulary * 3 // limit)))  # a row has about a third of the limit
    never = SpecialTokens(0, ())
    with torch.no_grad():
        timed(model, name, never, (rows, rows, 2), clock)
        best = alternately(
            {
                "one batch, two tokens": lambda: timed(model, name, never, (rows, rows, 2), clock),
                "one batch, all to the limit, fixed": lambda: timed(model, name, never, (rows, rows, limit), clock, refill=False),
                "one batch, all to the limit": lambda: timed(model, name, never, (rows, rows, limit), clock),
                "fixed batches": lambda: timed(model, name, ending, sizes, clock, refill=False),
                "refilled": lambda: timed(model, name, ending, sizes, clock),
            },
            times,
        )
        floor = limits(model, rows, 30 + limit / 2, clock)
    step = (best["one batch, all to the limit"]["seconds"] - best["one batch, two tokens"]["seconds"]) / (limit - 2)
    ratios = {
        "step over memory limit": step / floor["memory"],
        "step over product limit": step / floor["products"],
        "refilled over fixed batches": best["refilled"]["tokens_per_second"] / best["fixed batches"]["tokens_per_second"],
        "slots over fixed batch, nothing ends early": (
            best["one batch, all to the limit"]["tokens_per_second"] / best["one batch, all to the limit, fixed"]["tokens_per_second"]
        ),
    }
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).eval()
    best |= alternately(
        {
            "adapters apart": lambda: timed(adapted, name, ending, sizes, clock, merge_adapters=False),
            "adapters merged": lambda: timed(adapted, name, ending, sizes, clock),
        },
        times,
    )
    ratios["merged over apart"] = best["adapters merged"]["tokens_per_second"] / best["adapters apart"]["tokens_per_second"]
    return {"rows": rows, "prompts": sizes[1], "limit": limit, "ratios": ratios, "runs": best, "step_seconds": step, "limits": floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="once each, to see that it works")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    place = Path(__file__).parent / "results" / "decode.json"
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {options.threads} thread(s)",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "shapes": {},
    }
    for name in SHAPES:
        result["shapes"][name] = measure(name, device, 1 if options.quick else 3)
        print(name, json.dumps(result["shapes"][name]["ratios"], indent=1), flush=True)
        place.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
