"""On a machine with a GPU: is it right there, how fast is it, and how much faster than TRL 1.12.0's PPOTrainer? One command:

python -m benchmarks.gpu [--minutes 9]                # one GPU
python -m benchmarks.gpu --device cpu --tiny          # tries the command itself, anywhere

First log-probabilities on the device against float32 on the CPU. Then PPO rounds by phase, ours and TRL's, matrix products in bfloat16:
full tuning at SmolLM2-135M's shape, LoRA at a Llama of 1B's (random weights, which cost the same as learned ones). The update is held
against the measured peak of bfloat16 products, decoding against the measured memory bandwidth.
Equal on both sides are weights, prompts, reward, KL coefficient, learning rate, epochs and minibatches, and so responses, their tokens and
policy steps. Not equal in LoRA is the critic: `PPOTrainer` gives the policy alone an adapter and trains the critic whole, in float32, where
ours is an adapter too. `equal_work` in the results says of each part what was counted and whether it was equal, as on a CPU.
Writes benchmarks/results/gpu.json as results come, and docs/results/speed.md. Parts that the minutes do not reach are left out and
named. Needs trl 1.12.0 (the dev extra).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.race import compare, results
from benchmarks.race.floor import round_flops
from benchmarks.race.job import ROOT, Job, answer_of, run_side
from benchmarks.race.materials import prompt_ids, write_materials
from benchmarks.race.shapes import LLAMA_1B, SHAPES, SMOLLM2, Shape

NAME = "gpu"
UPDATES = 3
SMOL = Shape("SmolLM2-135M", SMOLLM2, batch=128, prompt=128, response=128, epochs=2, minibatches=4)
LARGE = Shape("Llama 1B", LLAMA_1B, batch=64, prompt=128, response=128, epochs=2, minibatches=4)
TINY = SHAPES["tiny"]


@dataclass(frozen=True)
class Part:
    """A race on the device."""

    shape: Shape
    tuning: str
    frozen: str  # precision of the weights that are not trained


GPU_PARTS = (Part(SMOL, "full", "bfloat16"), Part(LARGE, "lora", "bfloat16"))
TINY_PARTS = (Part(TINY, "full", "float32"), Part(TINY, "lora", "float32"))


def decode_limit(shape: Shape, prompts: Sequence[int], bytes_per_second: float, width: int = 2) -> float:
    """Tokens a second if a decode step only read each weight and the batch's keys and values once, `width` bytes a number.

    The embedding is not read whole; the LM head is.
    """
    model = shape.model
    blocks = model.layers * sum(a * b for _, a, b in model.linears())
    mean_length = sum(prompts) / len(prompts) + shape.response / 2
    cache = model.layers * 2 * model.kv_heads * model.head_dim * mean_length * shape.batch
    return shape.batch * bytes_per_second / (width * (blocks + model.hidden * model.vocab + cache))


def against_device(part: Part, side: dict[str, Any], speeds: dict[str, float], width: int) -> dict[str, float]:
    """Share of the product peak that the update's necessary arithmetic reaches, and of the bandwidth limit that decoding does."""
    shape = part.shape
    lengths = [len(ids) for ids in prompt_ids(shape, shape.batch * UPDATES)]
    tokens = side["response_tokens_per_second"] * side["seconds"]  # of a round
    flops = round_flops(shape, lengths, round(tokens / shape.batch), part.tuning)["update"].total / UPDATES
    return {
        "update_mfu": flops / side["phases"]["update"] / speeds["matmul_flop_per_second"],
        "decode_share": tokens / side["phases"]["rollout"] / decode_limit(shape, lengths, speeds["bytes_per_second"], width),
    }


def part_row(part: Part, speeds: dict[str, float], work: Path, device: str, left: Callable[[], float], tell: Callable[..., None]) -> None:
    """Race one part; tell(key=value) as results come."""
    shape, width = part.shape, 2 if device != "cpu" else 4
    folder = work / "materials" / shape.name.replace(" ", "-")
    told = {"folder": str(folder), "shape": shape.to_dict(), "prompts": shape.batch * UPDATES, "tunings": [part.tuning], "device": device}
    answer_of(
        "make_materials", told | {"dtype": part.frozen if part.tuning == "lora" else "float32"}, work / "make", device, timeout=left()
    )
    said = {}
    for side in ("ours", "trl_ppo"):
        place = work / f"{side}-{part.tuning}"
        job = Job(shape, part.tuning, UPDATES, str(folder), str(work / "warm-up"), str(place), device, device != "cpu", part.frozen)
        try:
            said[side] = run_side(side, job, timeout=left())
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # the other side's figures still count
            tell(**{f"{side}_failed": str(error)[-1500:]})
            print(f"{shape.name} {part.tuning}: {side} failed: {str(error)[-500:]}", flush=True)
            continue
        finally:
            shutil.rmtree(place / "run", ignore_errors=True)  # saved models
        short = compare.summary([said[side]])
        short |= against_device(part, short, speeds, width)
        short["gpu_peak_mb"] = said[side].get("gpu_peak_mb")
        tell(**{"ours" if side == "ours" else "peer": short})
        print(f"{shape.name} {part.tuning}: {said[side]['system']} {compare.told(said[side])}", flush=True)
    if len(said) == 2:
        ours, theirs = (compare.summary([said[side]]) for side in ("ours", "trl_ppo"))
        tell(
            speed_ratio=theirs["seconds"] / ours["seconds"],
            phase_ratios={name: theirs["phases"][name] / ours["phases"][name] for name in compare.PHASES},
            equal_work=compare.equal_work(shape, UPDATES, [said["ours"]], [said["trl_ppo"]]),
        )
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 …, or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, default=9.0, help="what has not finished by then is left out")
    parser.add_argument("--work", type=results.place, default=ROOT / "runs" / NAME)
    parser.add_argument("--results", type=results.place, default=results.FOLDER)
    args = parser.parse_args()
    work, end = args.work, time.monotonic() + 60 * args.minutes

    def left() -> float:
        return max(1.0, end - time.monotonic())

    content: dict[str, Any] = {"minutes": args.minutes, "checks": None, "rows": []}

    def save() -> None:
        results.write(NAME, content, {"trl": "1.12.0"}, args.results)
        results.write_page(args.results)

    write_materials(work / "warm-up", TINY, prompts=32)
    shape = TINY if args.tiny else SMOL
    checked = write_materials(work / "materials" / "checks", shape, prompts=32, tunings=())
    job = Job(shape, "full", 1, str(checked), str(work / "warm-up"), str(work / "checks"), args.device)
    content["checks"] = run_side("gpu_checks", job, timeout=left())
    save()
    print(f"{content['checks']['device']}: {content['checks']}", flush=True)
    shutil.rmtree(checked)
    for part in TINY_PARTS if args.tiny else GPU_PARTS:
        row: dict[str, Any] = {"shape": part.shape.to_dict(), "tuning": part.tuning, "frozen": part.frozen}
        content["rows"].append(row)

        def tell(row: dict[str, Any] = row, **figures: Any) -> None:
            row.update(figures)
            save()

        try:
            part_row(part, content["checks"]["speeds"], work, args.device, left, tell)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            tell(failed=str(error)[-1500:])
            print(f"{part.shape.name} {part.tuning}: {error}", flush=True)


if __name__ == "__main__":
    main()
