"""`srppo plan` as a function: read the configuration, find the machine, plan, and look for settings that fit where these do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from srppo.config import RunConfig
from srppo.errors import ConfigError
from srppo.models.load import resolve_device
from srppo.planning.architecture import read_architecture
from srppo.planning.lengths import find_lengths
from srppo.planning.machine import find_machine
from srppo.planning.plan import Plan, make_plan
from srppo.planning.remedy import Remedy, find_enough, find_remedy
from srppo.threads import set_threads


@dataclass(frozen=True)
class Planned:
    """plan: of the recipe as it is; remedy: changes that make it fit, None where it fits or nothing does; lengths_from: in words.
    enough: where it does not fit, GPUs of a machine and machines with which it does as it is."""

    plan: Plan
    remedy: Remedy | None
    lengths_from: str
    enough: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        remedy = None if self.remedy is None else {"changes": self.remedy.changes, "plan": self.remedy.plan.to_dict()}
        enough = None if self.enough is None else {"gpus": self.enough[0], "nodes": self.enough[1]}
        return self.plan.to_dict() | {"lengths_from": self.lengths_from, "remedy": remedy, "fits_on": enough}


def run_plan(
    config: RunConfig,
    *,
    gpu: str | None = None,
    gpus: int = 1,
    nodes: int = 1,
    gpu_memory: str | None = None,
    network: float | None = None,
    response_tokens: float | None = None,
) -> Planned:
    """Plan a run of srppo.align(config). No weights are read.

    gpu, gpus (of each machine), nodes (machines), gpu_memory, network (Gbit/s of a machine): where it is to run, by default on one GPU
    of this machine. response_tokens: mean length of the responses to come.
    Raises SrppoError for a model or machine that cannot be planned for.
    """
    if not config.model.name:
        raise ConfigError("model.name is not set: give a hub id or a Hugging Face folder")
    if gpu is None:
        resolve_device(config.model.device)
    set_threads(config.threads)
    architecture = read_architecture(config.model)
    lengths, where_from = find_lengths(config, architecture, response_tokens)
    products = config.model.dtype if config.model.autocast == "none" else config.model.autocast
    machine = find_machine(config.model.device, products, gpu=gpu, gpus=gpus, nodes=nodes, gpu_memory=gpu_memory, network=network)
    plan = make_plan(config, architecture, lengths, machine)
    if plan.fits:
        return Planned(plan, None, where_from)
    remedy = find_remedy(config, architecture, lengths, machine)
    return Planned(plan, remedy, where_from, find_enough(config, architecture, lengths, machine, network))
