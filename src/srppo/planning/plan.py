"""A run's plan: what it needs, phase by phase, on a machine."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from srppo.config import RunConfig
from srppo.errors import ConfigError, ModelError
from srppo.planning.architecture import Architecture
from srppo.planning.clock import Times, pass_seconds, scoring, sft_steps, times, training
from srppo.planning.dryrun import Footprint, Pass, footprint
from srppo.planning.inputs import Lengths, Settings, micro_rows, read_settings
from srppo.planning.machine import Machine
from srppo.planning.memory import FILE, HOLES, HOLES_CHECKPOINTING, PREFILL_TOKENS, SAVED, Model, Phase, phases, vllm_memory, with_holes
from srppo.planning.processes import ALONE, Processes, processes_of
from srppo.planning.reliability import Reliability, reliability
from srppo.planning.traffic import Flow, Micros, flows, seconds_of

MARGIN = 0.9  # of a device's memory that a run may be planned to fill: the allocator needs room


@dataclass(frozen=True)
class Hidden:
    """Tokens of a micro-batch in a process: from how many on computing takes longer than what is sent meanwhile, and how many there are."""

    needed: float
    there: float


@dataclass(frozen=True)
class Plan:
    """memory: the phases, in order; libraries' own memory is not in them, but in `need`."""

    model: str
    parameters: int
    adapter: int | None
    lengths: Lengths
    machine: Machine
    phases: list[Phase]
    times: Times
    flops: int  # of a round
    vllm_needs: int = 0  # bytes without which vLLM in this process does not start
    vllm_takes: int = 0
    processes: Processes = ALONE
    traffic: tuple[Flow, ...] = ()  # what each process sends in a round, and in SFT
    hidden: dict[str, Hidden] = field(default_factory=dict)  # by phase: from when on computing is longer than communication
    checkpoint: int = 0  # bytes of one, of all processes together

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=Phase.total)

    @property
    def need(self) -> int:
        """Peak of the device's memory: the worst phase and the libraries'."""
        return self.worst.total() + self.machine.libraries

    @property
    def host_need(self) -> int:
        """Peak of the memory beside the GPUs of a machine."""
        return max(self.host_total(phase) for phase in self.phases)

    def host_total(self, phase: Phase) -> int:
        """Of all processes of a machine; whole models are read by one after the other, and saved by rank 0 alone."""
        once = sum(i.bytes for i in phase.items if i.host and i.purpose in (FILE, SAVED))
        return (phase.total(host=True) - once) * self.machine.local + once

    @property
    def reliability(self) -> Reliability:
        return reliability(self.processes.size, self.processes.machines, self.checkpoint)

    @property
    def sent(self) -> int:
        """Bytes that each process sends in a round."""
        return sum(f.bytes for f in self.traffic if f.phase != "sft" and f.collective != "file")

    @property
    def over(self) -> dict[str, int]:
        """By how many bytes each phase needs more than may be filled ("NAME, CPU": of the memory beside a GPU); "vllm": what vLLM lacks."""
        m = self.machine
        device, host = int(MARGIN * m.memory), None if not m.gpu or m.host_memory is None else int(MARGIN * m.host_memory)
        found = {p.name: p.total() + m.libraries - device for p in self.phases}
        if host is not None:
            found |= {f"{p.name}, CPU": self.host_total(p) - host for p in self.phases}
        found["vllm"] = self.vllm_needs - self.vllm_takes
        return {name: size for name, size in found.items() if size > 0}

    @property
    def fits(self) -> bool:
        return not self.over

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "adapter_parameters": self.adapter,
            "fits": self.fits,
            "over_bytes": self.over,
            "peak_bytes": self.need,
            "peak_phase": self.worst.name,
            "host_peak_bytes": self.host_need if self.machine.gpu else None,
            "libraries_bytes": self.machine.libraries,
            "phases": [{"name": p.name, "bytes": p.total(), "items": [asdict(i) for i in p.items]} for p in self.phases],
            "seconds": asdict(self.times) | {"round": self.times.round, "total": self.times.total},
            "flops_per_round": self.flops,
            "lengths": asdict(self.lengths),
            "machine": asdict(self.machine),
            **self._several(),
        }

    def _several(self) -> dict[str, Any]:
        """What there is to say of several processes."""
        if self.processes.size == 1:
            return {}
        return {
            "processes": asdict(self.processes),
            "sent_bytes_per_round": self.sent,
            "traffic": [asdict(f) for f in self.traffic],
            "hidden_from_tokens": {name: asdict(h) for name, h in self.hidden.items()},
            "reliability": asdict(self.reliability) | {"lost": self.reliability.lost},
        }


def make_plan(config: RunConfig, architecture: Architecture, lengths: Lengths, machine: Machine, *, activations: bool = True) -> Plan:
    """Pure but for the dry runs, which need no memory. Raises ModelError.

    A first plan takes one to three seconds of CPU time whatever the model's size, one whose passes were planned before a few milliseconds.
    activations False: without dry runs, a lower bound of the memory; its times say nothing.
    """
    settings = replace(read_settings(config), alone=machine.count == 1)
    few = settings.lora_layers
    if few is not None and few > architecture.layers:
        raise ModelError(f"tuning.lora_layers is {few}, but {config.model.name} has {architecture.layers} decoder layers")
    processes = processes_of(machine.count, machine.local, settings.shard_size, settings.cpu_offload)
    if processes.size > 1 and settings.engine == "vllm":
        raise ConfigError("rollout.engine: vllm runs inside one process; for several give servers with rollout.server")
    model = describe(architecture, settings)
    work, micros = planned_passes(settings, lengths, machine.gpu, processes)
    done = dict.fromkeys(work, Footprint())
    if activations:
        done = {name: _cached(architecture, p, few if p.train or name == "above" else None) for name, p in work.items()}
    holes = HOLES[config.tuning.kind]
    factors = {name: HOLES_CHECKPOINTING if p.checkpointing else holes for name, p in work.items()}
    held = done if machine.gpu else {name: with_holes(f, factors[name]) for name, f in done.items()}
    takes, needs = vllm_memory(model, settings, lengths, machine.memory, gpu=machine.gpu) if settings.engine == "vllm" else (0, 0)
    parts = phases(model, settings, lengths, held, micros, gpu=machine.gpu, processes=processes, vllm=takes)
    tokens = {name: p.rows * p.length for name, p in work.items()}
    sent = flows(model, settings, lengths, processes, machine.links, sft_steps(settings, lengths))
    clock = times(model, settings, lengths, done, tokens, machine, processes, seconds_of(sent))
    return Plan(
        config.model.name,
        model.counts.total,
        None if settings.full else model.adapter,
        lengths,
        machine,
        parts,
        clock,
        round_flops(settings, lengths, done, tokens),
        needs,
        takes,
        processes,
        tuple(sent),
        hidden(settings, lengths, done, tokens, machine, processes, clock.network) if processes.size > 1 and activations else {},
        checkpoint_bytes(model, settings),
    )


def hidden(
    settings: Settings,
    lengths: Lengths,
    done: Mapping[str, Footprint],
    tokens: Mapping[str, int],
    machine: Machine,
    processes: Processes,
    network: Mapping[str, float],
) -> dict[str, Hidden]:
    """For scoring and update: what each micro-batch sends takes as long however many tokens it has, computing grows with them."""
    s, micros = settings, Micros.of(settings, lengths, processes)
    each = lengths.mean_prompt + lengths.mean_response
    steps = s.epochs * min(s.minibatches, s.rollouts)

    def token(name: str) -> float:
        return pass_seconds(done[name], machine) / max(1, tokens[name])

    costs = {
        "scoring": (scoring(s, token), micros.score, processes.rows(s.rollouts)),
        "update": (training(s, token), micros.update * steps, processes.rows(s.minibatch) * steps),
    }
    return {
        phase: Hidden(network.get(phase, 0.0) / count / cost, rows * each / count) for phase, (cost, count, rows) in costs.items() if cost
    }


def checkpoint_bytes(model: Model, settings: Settings) -> int:
    """Weights and two moments of what is trained."""
    s = settings
    sizes = [model.counts.total if s.full else model.adapter]
    if s.critic == "own":
        sizes.append(model.counts.trunk if s.full else model.adapter)
    return 3 * sum(sizes) * s.trained_bytes


def round_flops(settings: Settings, lengths: Lengths, done: Mapping[str, Footprint], tokens: Mapping[str, int]) -> int:
    """Floating operations of a round's passes."""
    s, each = settings, lengths.mean_prompt + lengths.mean_response
    a_token = {name: f.flops / max(1, tokens[name]) for name, f in done.items()}
    rows = s.rollouts * each
    trained = training(s, a_token.__getitem__)
    rollout = s.prompts * lengths.mean_prompt * a_token["prefill"] + s.rollouts * lengths.mean_response * a_token["decode"]
    return round(rollout + rows * (scoring(s, a_token.__getitem__) + s.epochs * trained))


@functools.lru_cache(maxsize=256)
def _cached(architecture: Architecture, work: Pass, layers: int | None) -> Footprint:
    return footprint(architecture, work, layers)


@functools.lru_cache(maxsize=64)
def _adapter(architecture: Architecture, rank: int, targets: str | tuple[str, ...], layers: int | None) -> tuple[int, int]:
    return architecture.adapter_sizes(rank, targets, layers)


def describe(architecture: Architecture, settings: Settings) -> Model:
    """The sizes that the formulas need."""
    s = settings
    adapter, adapted = (0, 0) if s.full else _adapter(architecture, s.lora_rank, s.lora_targets, s.lora_layers)
    counts = architecture.counts
    return Model(
        counts,
        architecture.layers,
        architecture.cache_elements,
        architecture.state_elements,
        adapter,
        adapted,
    )


def planned_passes(
    settings: Settings, lengths: Lengths, gpu: bool, processes: Processes | None = None
) -> tuple[dict[str, Pass], dict[str, int]]:
    """The passes of a run by name, and how many micro-batches an optimizer step of each training pass has, in one process."""
    s, longest, p = settings, lengths.max_prompt + lengths.max_response, processes or Processes()
    minibatch, taught_rows, sampled = p.rows(s.minibatch), p.rows(s.sft_batch), p.rows(s.rollouts)
    rank = None if s.full else s.lora_rank
    learn: dict[str, Any] = {"train": True, "checkpointing": s.checkpointing, "lora_rank": rank, "lora_targets": s.lora_targets}
    common: dict[str, Any] = {"autocast": s.autocast, "dtype": s.dtype, "device": "cuda" if gpu else "cpu"}
    rows = micro_rows(longest, minibatch, s.micro_tokens)
    scored = micro_rows(longest, sampled, s.micro_tokens)
    sft_rows = micro_rows(lengths.max_demonstration, taught_rows, s.sft_micro_tokens)
    taught = max(1, lengths.max_demonstration - min(lengths.max_prompt, lengths.max_demonstration - 1))
    response = lengths.max_response
    unmerged: dict[str, Any] = {"lora_rank": rank, "lora_targets": s.lora_targets} if s.engine == "torch" and not s.merges(gpu) else {}
    decoded = min(s.rollout_rows, sampled)
    read = max(1, min(-(-decoded // s.samples_per_prompt), PREFILL_TOKENS // lengths.max_prompt))
    out = {
        "score": Pass(scored, longest, response, **common),
        "policy": Pass(rows, longest, response, entropy=s.entropy, **learn, **common),
        "prefill": Pass(read, lengths.max_prompt, 1, head="last", **common, **unmerged),
        "decode": Pass(decoded, 1, 1, head="last", **common, **unmerged),
    }
    if s.lora_layers is not None:
        out["above"] = out["score"]  # of the last layers alone
    if s.sft_steps != 0:
        out["sft"] = Pass(sft_rows, lengths.max_demonstration, taught, **learn, **common)
    if s.critic == "own":
        out["critic"] = Pass(rows, longest, response, head="values", **learn, **common)
    micros = dict.fromkeys(("policy", "critic"), -(-minibatch // rows)) | {"sft": -(-taught_rows // sft_rows)}
    return out, micros
