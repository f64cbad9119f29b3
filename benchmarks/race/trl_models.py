"""What both TRL sides share: models of a race's materials, and the clock on any device."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from benchmarks.race.job import Job
from benchmarks.race.shapes import Shape
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM


def read_model(folder: Path, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def merged_sft(materials: Path, dtype: str = "float32") -> Any:
    """The base with the SFT adapter merged into it, from which TRL's LoRA policy starts."""
    return PeftModel.from_pretrained(read_model(materials / "base", dtype), materials / "sft_adapter").merge_and_unload()


def autocasting(job: Job) -> AbstractContextManager[object]:
    """All of a training in bfloat16 products, generation and frozen models too (TRL's own bf16 reaches the wrapped model alone)."""
    return torch.autocast(job.device.split(":")[0], dtype=torch.bfloat16) if job.autocast else nullcontext()


def lora_config(shape: Shape, task: str | None = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules="all-linear", task_type=task)


def now(device: Any) -> float:
    """Seconds, once the device has finished what it was given."""
    if "cpu" not in str(device):
        torch.cuda.synchronize()
    return time.perf_counter()
