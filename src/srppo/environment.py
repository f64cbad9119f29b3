"""What a figure depends on besides the configuration: versions and hardware. Loads no heavy library itself."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

from srppo.world import world

PACKAGES = ("srppo", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "pydantic", "numpy")


def version(package: str) -> str | None:
    """Installed version of a distribution, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of the packages that decide what is computed, those installed."""
    found = {name: version(name) for name in PACKAGES}
    return {name: number for name, number in found.items() if number}


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory in GB (1e9 bytes) and, where torch is loaded already, its threads and GPUs."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
        model = next((line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out: dict[str, Any] = {"cpu": model, "cores": cores}
    with contextlib.suppress(ValueError, OSError, AttributeError):
        out["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if (here := world()).size > 1:
        out["processes"] = here.size
    torch = sys.modules.get("torch")
    if torch is not None:
        out["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            out["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return out


def environment() -> dict[str, Any]:
    """Of this process: {"python", "system", "packages": {name: version}, "hardware": {…}}."""
    return {"python": platform.python_version(), "system": platform.platform(), "packages": versions(), "hardware": hardware()}
