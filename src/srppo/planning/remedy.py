"""What to change in a recipe that does not fit a machine: the mildest sum of changes with which it does. Ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from srppo.config import RunConfig
from srppo.planning.architecture import Architecture
from srppo.planning.inputs import Lengths, changed
from srppo.planning.machine import Machine, card_of
from srppo.planning.plan import Plan, make_plan
from srppo.planning.processes import links_of

UPDATES = {"policy update", "critic update"}
# the phases that a change can lower; a change that is not named here can lower any
LOWERS = {
    "ppo.micro_batch_tokens": {"scoring", *UPDATES},
    "sft.micro_batch_tokens": {"sft"},
    "rollout.batch_size": {"rollout"},
    "evaluation.batch_size": {"reward card", "evaluation"},
    "diagnose.preview": {"reward card"},
    "rollout.merge_adapters": {"reward card", "rollout", "evaluation"},
    "model.gradient_checkpointing": {"sft", *UPDATES},
}
LEAST = {"ppo.micro_batch_tokens": 256, "sft.micro_batch_tokens": 256, "rollout.batch_size": 8, "evaluation.batch_size": 8}
FEW_LAYERS = 4
SOME_SERVER = "http://HOST:8000"
TOGETHER = dict.fromkeys(("rollout.engine", "rollout.server"), ("rollout.engine", "rollout.server"))
MOST_GPUS, MOST_NODES = 8, 32  # of a machine; machines

Changes = dict[str, Any]  # dotted keys
Try = Callable[[Changes], Plan]


@dataclass(frozen=True)
class Remedy:
    """Dotted keys to change, and the plan with them."""

    changes: Changes
    plan: Plan


def remedies(config: RunConfig, gpu: bool, layers: int, processes: int = 1) -> Iterator[Changes]:
    """Changes that lower memory, those that change nothing but speed first, those that change what is learned last.

    Sizes are changed to the smallest at once; `milder` finds how much of that is needed. layers: of the model.
    """
    shards = config.parallel.shard_size or processes
    for key, least in LEAST.items():
        if value_of(config, key) > least:
            yield {key: least}
    if config.diagnose.enabled and config.diagnose.preview:
        yield {"diagnose.preview": False}
    if config.tuning.kind == "lora" and config.rollout.merge_adapters:
        yield {"rollout.merge_adapters": False}
    if config.rollout.engine == "vllm" and config.rollout.server is None:
        yield {"rollout.engine": "torch"}
    if shards < processes:
        yield {"parallel.shard_size": None}
    if not config.model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    if config.tuning.kind == "full":
        if (config.model.frozen_dtype or config.model.dtype) == "float32":
            yield {"model.frozen_dtype": "bfloat16"}
        if gpu and shards == 1 and not config.model.offload_frozen:
            yield {"model.offload_frozen": True}
    if gpu and shards > 1 and config.rollout.engine == "torch":  # else each process holds the whole policy while it samples
        yield {"rollout.engine": "vllm", "rollout.server": SOME_SERVER}
    if gpu and shards > 1 and not config.parallel.cpu_offload:
        yield {"parallel.cpu_offload": True}
    if config.ppo.baseline == "critic" and config.tuning.critic == "own":
        yield {"tuning.critic": "least_squares"}
    if config.tuning.kind == "full":
        yield {"tuning.kind": "lora"}
    if config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if config.tuning.kind == "lora" and (config.tuning.lora_layers or layers) > FEW_LAYERS:
        yield {"tuning.lora_layers": FEW_LAYERS}


def find_remedy(config: RunConfig, architecture: Architecture, lengths: Lengths, machine: Machine) -> Remedy | None:
    """The first sum of remedies that fits, less those of them that it can do without; None where all of them together do not fit.

    First by what is held in any case, which needs no dry run: while weights alone do not fit, nobody need know the activations.
    2 to 7 s of CPU time for a Llama of 8B (docs/plan.md), nearly all of it dry runs.
    """

    def bound(changes: Changes) -> Plan:
        return make_plan(changed(config, changes), architecture, lengths, machine, activations=False)

    def whole(changes: Changes) -> Plan:
        light = bound(changes)
        return make_plan(changed(config, changes), architecture, lengths, machine) if light.fits else light

    kept: Changes = {}
    for attempt in (bound, whole):
        grown = _grown(config, kept, attempt, machine, architecture.layers)
        if grown is None:
            return None
        kept = _shrunk(config, grown, attempt)
    return Remedy(kept, whole(kept))


def _grown(config: RunConfig, start: Changes, attempt: Try, machine: Machine, layers: int) -> Changes | None:
    """`start` and remedies that make it fit: again and again the first that lowers what does not."""
    kept, plan = start, attempt(start)
    while not plan.fits:
        for change in remedies(changed(config, kept), machine.gpu, layers, machine.count):
            over, key = plan.over, next(iter(change))
            if LOWERS.get(key, over.keys()).isdisjoint(over):
                continue
            after = attempt(kept | change)
            if lowers(after.over, over):
                kept, plan = kept | change, after
                break
        else:
            return None
    return kept


def find_enough(
    config: RunConfig, architecture: Architecture, lengths: Lengths, machine: Machine, network: float | None = None
) -> tuple[int, int] | None:
    """GPUs of a machine and machines, doubled until the recipe fits as it is; None where 8 on 32 are too few.

    First by what is held in any case, as in find_remedy. Weights are spread over all of them.
    """
    if not machine.gpu or (config.rollout.engine == "vllm" and config.rollout.server is None):
        return None
    config = changed(config, {"parallel.shard_size": None})
    gpus, nodes = machine.local, machine.nodes
    while gpus * 2 <= MOST_GPUS or nodes * 2 <= MOST_NODES:
        gpus, nodes = (gpus * 2, nodes) if gpus * 2 <= MOST_GPUS else (gpus, nodes * 2)
        more = replace(machine, count=gpus * nodes, nodes=nodes, links=links_of(card_of(machine.name), gpus, network))
        if all(make_plan(config, architecture, lengths, more, activations=whole).fits for whole in (False, True)):
            return gpus, nodes
    return None


def lowers(after: dict[str, int], before: dict[str, int]) -> bool:
    """Whether some excess is lower, and the largest is not higher: another change may lower that one."""
    less = any(after.get(name, 0) < excess for name, excess in before.items())
    return less and max(after.values(), default=0) <= max(before.values())


def _shrunk(config: RunConfig, changes: Changes, attempt: Try) -> Changes:
    """Without what the others have made needless, the last first, and with sizes as large as they may be."""
    kept = changes
    for key in reversed(list(changes)):
        less = {k: v for k, v in kept.items() if k not in TOGETHER.get(key, (key,))}
        if less != kept and attempt(less).fits:
            kept = less
    for key in [k for k in kept if k in LEAST]:
        kept = milder(kept, key, value_of(config, key), attempt)
    return kept


def milder(changes: Changes, key: str, whole: int, attempt: Try) -> Changes:
    """`changes`, which fit, with the size at `key` doubled as often as fits, below `whole`; found by bisection."""
    trials = [changes]
    while 2 * trials[-1][key] < whole:
        trials.append(changes | {key: 2 * trials[-1][key]})
    low, high = 0, len(trials)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if attempt(trials[middle]).fits else (low, middle)
    return trials[low]


def value_of(config: RunConfig, key: str) -> int:
    """A dotted key's value."""
    section, name = key.split(".")
    value: int = getattr(getattr(config, section), name)
    return value
