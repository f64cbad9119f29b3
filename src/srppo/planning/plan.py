"""A run's plan: what it needs, phase by phase, on a machine, and what to change where it does not fit."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from srppo.config import RunConfig
from srppo.planning.architecture import Architecture
from srppo.planning.clock import Times, times
from srppo.planning.dryrun import Footprint, Pass, footprint
from srppo.planning.inputs import Lengths, Settings, changed, micro_rows, read_settings
from srppo.planning.machine import Machine
from srppo.planning.memory import HOLES, PREFILL_TOKENS, Model, Phase, phases, with_holes

MARGIN = 0.9  # of a device's memory that a run may be planned to fill: the allocator needs room


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

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=Phase.total)

    @property
    def need(self) -> int:
        """Peak of the device's memory: the worst phase and the libraries'."""
        return self.worst.total() + self.machine.libraries

    @property
    def host_need(self) -> int:
        return max(phase.total(host=True) for phase in self.phases)

    @property
    def fits(self) -> bool:
        m = self.machine
        return self.need <= MARGIN * m.memory and (not m.gpu or m.host_memory is None or self.host_need <= MARGIN * m.host_memory)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "adapter_parameters": self.adapter,
            "fits": self.fits,
            "peak_bytes": self.need,
            "peak_phase": self.worst.name,
            "host_peak_bytes": self.host_need if self.machine.gpu else None,
            "libraries_bytes": self.machine.libraries,
            "phases": [{"name": p.name, "bytes": p.total(), "items": [asdict(i) for i in p.items]} for p in self.phases],
            "seconds": asdict(self.times) | {"round": self.times.round, "total": self.times.total},
            "flops_per_round": self.flops,
            "lengths": asdict(self.lengths),
            "machine": asdict(self.machine),
        }


def make_plan(config: RunConfig, architecture: Architecture, lengths: Lengths, machine: Machine) -> Plan:
    """Pure but for the dry runs, which need no memory and a second or two."""
    settings = read_settings(config)
    model = describe(architecture, settings)
    work, micros = planned_passes(settings, lengths, machine.gpu)
    done = {name: _cached(architecture, p, settings.lora_layers if p.train else None) for name, p in work.items()}
    held = done if machine.gpu else {name: with_holes(f, HOLES[config.tuning.kind]) for name, f in done.items()}
    parts = phases(model, settings, lengths, held, micros, gpu=machine.gpu, shards=machine.count)
    tokens = {name: p.rows * p.length for name, p in work.items()}
    clock = times(model, settings, lengths, done, tokens, machine)
    return Plan(
        config.model.name,
        model.counts.total,
        None if settings.full else model.adapter,
        lengths,
        machine,
        parts,
        clock,
        round_flops(settings, lengths, done, tokens),
    )


def round_flops(settings: Settings, lengths: Lengths, done: Mapping[str, Footprint], tokens: Mapping[str, int]) -> int:
    """Floating operations of a round's passes."""
    s, each = settings, lengths.mean_prompt + lengths.mean_response
    a_token = {name: f.flops / max(1, tokens[name]) for name, f in done.items()}
    rows = s.rollouts * each
    passes = 2 + s.reward_model + s.recompute + (s.critic == "own")
    trained = a_token["policy"] + (a_token["critic"] if s.critic == "own" else 0.0)
    rollout = s.prompts * lengths.mean_prompt * a_token["prefill"] + s.rollouts * lengths.mean_response * a_token["decode"]
    return round(rollout + rows * (passes * a_token["score"] + s.epochs * trained))


@functools.lru_cache(maxsize=256)
def _cached(architecture: Architecture, work: Pass, layers: int | None) -> Footprint:
    return footprint(architecture, work, layers)


@functools.lru_cache(maxsize=64)
def _adapter(architecture: Architecture, rank: int, targets: str | tuple[str, ...], layers: int | None) -> int:
    return architecture.adapter_parameters(rank, targets, layers)


def describe(architecture: Architecture, settings: Settings) -> Model:
    """The sizes that the formulas need."""
    s = settings
    adapter = 0 if s.full else _adapter(architecture, s.lora_rank, s.lora_targets, s.lora_layers)
    counts = architecture.counts
    inner = counts.trunk - counts.embedding
    return Model(
        counts,
        architecture.layers,
        architecture.cache_elements,
        architecture.state_elements,
        adapter,
        counts.embedding,
        max(counts.embedding, inner // architecture.layers),
    )


def planned_passes(settings: Settings, lengths: Lengths, gpu: bool) -> tuple[dict[str, Pass], dict[str, int]]:
    """The passes of a run by name, and how many micro-batches an optimizer step of each training pass has."""
    s, longest = settings, lengths.max_prompt + lengths.max_response
    rank = None if s.full else s.lora_rank
    learn: dict[str, Any] = {"train": True, "checkpointing": s.checkpointing, "lora_rank": rank, "lora_targets": s.lora_targets}
    common: dict[str, Any] = {"autocast": s.autocast, "dtype": s.dtype, "device": "cuda" if gpu else "cpu"}
    rows = micro_rows(longest, s.minibatch, s.micro_tokens)
    scored = micro_rows(longest, s.rollouts, s.micro_tokens)
    sft_rows = micro_rows(lengths.max_demonstration, s.sft_batch, s.sft_micro_tokens)
    taught = max(1, lengths.max_demonstration - min(lengths.max_prompt, lengths.max_demonstration - 1))
    response = lengths.max_response
    decoded = min(s.rollout_rows, s.rollouts)
    read = max(1, min(-(-decoded // s.samples_per_prompt), PREFILL_TOKENS // lengths.max_prompt))
    out = {
        "score": Pass(scored, longest, response, **common),
        "policy": Pass(rows, longest, response, entropy=s.entropy, **learn, **common),
        "prefill": Pass(read, lengths.max_prompt, 1, head="last", **common),
        "decode": Pass(decoded, 1, 1, head="last", **common),
    }
    if s.sft_steps != 0:
        out["sft"] = Pass(sft_rows, lengths.max_demonstration, taught, **learn, **common)
    if s.critic == "own":
        out["critic"] = Pass(rows, longest, response, head="values", **learn, **common)
    micros = dict.fromkeys(("policy", "critic"), -(-s.minibatch // rows)) | {"sft": -(-s.sft_batch // sft_rows)}
    return out, micros


def remedies(config: RunConfig, gpu: bool) -> Iterator[dict[str, Any]]:
    """Changes that lower memory, those that change nothing but speed first, those that change what is learned last. They add up."""
    for section in ("ppo", "sft"):
        value = getattr(config, section).micro_batch_tokens
        while value > 256:
            value = max(256, value // 2)
            yield {f"{section}.micro_batch_tokens": value}
    for section in ("rollout", "evaluation"):
        value = getattr(config, section).batch_size
        while value > 8:
            value = max(8, value // 2)
            yield {f"{section}.batch_size": value}
    if not config.model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    if config.tuning.kind == "full":
        if (config.model.frozen_dtype or config.model.dtype) == "float32":
            yield {"model.frozen_dtype": "bfloat16"}
        if gpu:
            yield {"model.offload_frozen": True}
    if config.ppo.baseline == "critic":
        yield {"tuning.critic": "least_squares"}
    if config.tuning.kind == "full":
        yield {"tuning.kind": "lora"}
    if config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    yield {"tuning.lora_layers": 4}


@dataclass(frozen=True)
class Remedy:
    """Dotted keys to change, and the plan with them."""

    changes: dict[str, Any]
    plan: Plan


def find_remedy(config: RunConfig, architecture: Architecture, lengths: Lengths, machine: Machine) -> Remedy | None:
    """The first sum of remedies that fits, less those of them that it can do without; None where all of them together do not fit."""
    plan = make_plan(config, architecture, lengths, machine)
    kept: dict[str, Any] = {}
    for change in remedies(config, machine.gpu):
        trial = kept | change
        after = make_plan(changed(config, trial), architecture, lengths, machine)
        if after.need >= plan.need and after.host_need >= plan.host_need and not _lowers_some(after, plan):
            continue
        kept, plan = trial, after
        if plan.fits:
            break
    if not plan.fits:
        return None
    for key in reversed(list(kept)):  # an earlier, milder change may have become needless
        less = {k: v for k, v in kept.items() if k != key}
        after = make_plan(changed(config, less), architecture, lengths, machine)
        if less and after.fits:
            kept, plan = less, after
    return Remedy(kept, plan)


def _lowers_some(after: Plan, before: Plan) -> bool:
    """Whether some phase needs clearly less: the worst one may be lowered by another change."""
    names = {p.name: p.total() for p in before.phases}
    return any(p.name in names and p.total() < 0.98 * names[p.name] for p in after.phases)
