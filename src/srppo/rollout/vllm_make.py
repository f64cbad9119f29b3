"""From a configuration with rollout.engine: vllm to the engine it asks for. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srppo.config import RunConfig
from srppo.errors import ConfigError
from srppo.rollout.asked_by_main import AskedByMain
from srppo.rollout.engine import RolloutEngine
from srppo.rollout.vllm_engine import INSTALL, VLLMEngine
from srppo.rollout.vllm_http import Connection
from srppo.rollout.vllm_server import PATIENCE, VLLMServerEngine
from srppo.world import world

if TYPE_CHECKING:
    from srppo.models.load import SpecialTokens


def check_vllm(config: RunConfig) -> None:
    """Fail before anything is loaded where the rollout section cannot be run. Raises ConfigError."""
    rollout = config.rollout
    if rollout.engine != "vllm":
        if rollout.server is not None:
            raise ConfigError("rollout.server is set, but rollout.engine is torch; set rollout.engine: vllm, or remove the server")
        return
    for url in servers(config):
        Connection(url)
    if not servers(config) and not world().alone:
        raise ConfigError(
            "rollout.engine: vllm inside the process is for one process; with several, start vLLM servers (on the same machine or others, "
            "docs/vllm.md) and name them in rollout.server, or set rollout.engine: torch"
        )
    if not servers(config) and find_spec("vllm") is None:
        raise ConfigError(f"rollout.engine: vllm needs vLLM, which is not installed. {INSTALL}")


def servers(config: RunConfig) -> list[str]:
    """The addresses of rollout.server."""
    named = config.rollout.server
    return [named] if isinstance(named, str) else list(named or [])


def vllm_engine(
    config: RunConfig, special: SpecialTokens, longest: int, device: torch.device, warn: Callable[[str], None] = lambda text: None
) -> RolloutEngine:
    """The engine for a run whose longest prompt has `longest` tokens. warn: is told of servers that fail. Raises ConfigError."""
    rollout, model, tuning = config.rollout, config.model, config.tuning
    if urls := servers(config):
        folder = rollout.shared_folder or Path(config.output) / "vllm"
        asked = VLLMServerEngine(special, urls, rollout.batch_size, folder, PATIENCE, warn)
        return asked if world().alone else AskedByMain(asked)
    # what the trainer's products are in; on a CPU the torch engine decodes in float32 under autocast, and so does this one
    dtype = "bfloat16" if model.autocast == "bfloat16" and device.type != "cpu" else None
    rank = tuning.lora_rank if tuning.kind == "lora" else 0
    tokens = longest + rollout.max_new_tokens
    return VLLMEngine(special, rollout.batch_size, dtype=dtype, memory=rollout.memory, lora_rank=rank, max_tokens=tokens)
