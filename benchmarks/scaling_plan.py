"""The tables of docs/scaling.md: 8B and 70B models on 1 to 256 GPUs, by srppo plan's own functions. One command, no network, no weights:

python -m benchmarks.scaling_plan

Takes about two minutes of one core. tests/test_scaling_page.py makes some rows anew and compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from srppo.config import build, merge
from srppo.planning.architecture import Architecture
from srppo.planning.inputs import Lengths
from srppo.planning.machine import find_machine
from srppo.planning.plan import Plan, make_plan
from srppo.planning.tell import duration_of, size
from srppo.text import duration

PAGE = Path(__file__).resolve().parent.parent / "docs/scaling.md"
LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192}
LLAMA |= {"tie_word_embeddings": False}
SHAPES = {  # of Llama 3.1 (Llama Team 2024, arXiv 2407.21783, table 3)
    "8B": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LENGTHS = Lengths(512, 1024, 200.0, 500.0, 1536, 700.0)
COMMON = {
    "model.name": "given",
    "model.gradient_checkpointing": True,
    "sft.checkpoint": "given",
    "ppo.prompts_per_iteration": 1024,
    "ppo.micro_batch_tokens": 8192,
    "rollout.batch_size": 128,
    "rollout.max_new_tokens": 1024,
}
MIXED = {"model.dtype": "float32", "model.autocast": "bfloat16", "model.frozen_dtype": "bfloat16"}
MIXED |= {"rollout.batch_size": 32, "evaluation.batch_size": 32}
HALF = {"model.dtype": "bfloat16"}
LORA = {"tuning.kind": "lora", **HALF}
SERVED = {"rollout.engine": "vllm", "rollout.server": "http://HOST:8000"}


@dataclass(frozen=True)
class Case:
    """A row: a model, what differs from COMMON, and where."""

    model: str
    words: str
    changes: dict[str, Any] = field(hash=False)
    gpus: int = 1
    nodes: int = 1
    network: float | None = None


FULL, FULL_70, LORA_70 = "full, float32 and autocast", "full, float32 and autocast, servers", "LoRA, servers"
FITTED, AWAY = {"tuning.critic": "least_squares"}, {"model.offload_frozen": True}
SMALLER = {"ppo.micro_batch_tokens": 1536, "rollout.batch_size": 16, "evaluation.batch_size": 16}
ONE_CARD = [
    Case("8B", "LoRA", LORA),
    Case("8B", "LoRA, critic fitted", LORA | FITTED),
    Case("8B", "full, bfloat16", HALF | SMALLER),
    Case(
        "8B",
        "full, bfloat16, critic fitted, frozen copies off the GPU",
        HALF | SMALLER | {"tuning.critic": "least_squares", "model.offload_frozen": True},
    ),
    Case("8B", "full, float32 and autocast", MIXED | SMALLER),
]
NODES = (1, 2, 4, 8, 16, 32)
MANY = [
    *(Case("8B", "LoRA", LORA, 8, n) for n in NODES),
    *(Case("8B", "LoRA, shard_size 1", LORA | {"parallel.shard_size": 1}, 8, n) for n in NODES),
    *(Case("8B", FULL, MIXED, 8, n) for n in NODES),
    *(Case("8B", f"{FULL}, shard_size 8", MIXED | {"parallel.shard_size": 8}, 8, n) for n in NODES[1:]),
    *(Case("70B", LORA_70, LORA | SERVED, 8, n) for n in NODES),
    *(Case("70B", FULL_70, MIXED | SERVED, 8, n) for n in NODES[1:]),
]
ALL_8 = f"{FULL}, shard_size 8"
BORDER = [
    Case("8B", words, changes, 8, nodes, network)
    for words, changes, nodes, network in (
        (FULL, MIXED, 1, None),
        (FULL, MIXED, 4, None),
        (FULL, MIXED, 32, None),
        (FULL, MIXED, 4, 800.0),
        (FULL, MIXED, 4, 100.0),
        (ALL_8, MIXED | {"parallel.shard_size": 8}, 4, 800.0),
        (ALL_8, MIXED | {"parallel.shard_size": 8}, 4, 100.0),
        ("LoRA", LORA, 4, 100.0),
        ("LoRA, shard_size 8", LORA | {"parallel.shard_size": 8}, 4, 100.0),
    )
]


@cache
def architecture(model: str) -> Architecture:
    from transformers import CONFIG_MAPPING

    return Architecture(CONFIG_MAPPING["llama"](**SHAPES[model]), model)


@cache
def plan(case: Case) -> Plan:
    config = build(merge({}, COMMON | case.changes))
    products = config.model.dtype if config.model.autocast == "none" else config.model.autocast
    machine = find_machine("cuda", products, gpu="h100", gpus=case.gpus, nodes=case.nodes, network=case.network)
    return make_plan(config, architecture(case.model), LENGTHS, machine)


def fits(p: Plan) -> str:
    return f"{size(p.need)} ({p.worst.name})" + ("" if p.fits else ", **too much**")


def one_card(case: Case) -> list[str]:
    p = plan(case)
    held = {purpose: sum(i.bytes for i in p.worst.items if i.purpose == purpose and not i.host) for purpose in ("weights", "optimizer")}
    return [case.words, fits(p), size(held["weights"]), size(held["optimizer"]), duration_of(p.times.round)]


def many(case: Case) -> list[str]:
    p, t = plan(case), plan(case).times
    first = plan(next(c for c in MANY if c.model == case.model and c.words.split(", shard")[0] == case.words.split(", shard")[0]))
    share = first.times.round * first.processes.size / (t.round * p.processes.size)
    hidden = " / ".join(f"{p.times.network.get(phase, 0.0):.1f}" for phase in ("scoring", "update"))
    took = " + ".join(duration_of(x) for x in (t.rollout, t.score, t.update))
    return [
        case.model, case.words, str(p.processes.size), fits(p), took, duration_of(t.round), f"{100 * share:.0f} %", volume(p.sent), hidden,
    ]  # fmt: skip


def border(case: Case) -> list[str]:
    p = plan(case)
    words = [f"{h.needed:,.0f} of {h.there:,.0f}" for h in (p.hidden["scoring"], p.hidden["update"])]
    network = "NVLink alone" if case.nodes == 1 else f"{8 * p.machine.links.between / 0.8 / 1e9:,.0f} Gbit/s"
    return [case.words, str(p.processes.size), network, *words, duration_of(p.times.round)]


def failures(case: Case) -> list[str]:
    p = plan(case)
    r = p.reliability
    every = max(1, round(r.interval / p.times.round))
    return [
        case.model, str(p.processes.size), duration(r.between_failures), size(r.checkpoint_bytes), duration_of(r.checkpoint_seconds),
        duration(r.interval), str(every), f"{100 * r.lost:.2f} %",
    ]  # fmt: skip


def volume(count: float) -> str:
    """Bytes as GB, or as TB from 1000 GB on."""
    return f"{count / 1e12:.2f} TB" if count >= 1e12 else size(count)


Row = Callable[[Case], list[str]]
TABLES: dict[str, tuple[Sequence[str], Row, list[Case]]] = {
    "one card": (["tuning", "peak", "of it weights", "moments", "a round"], one_card, ONE_CARD),
    "many": (
        ["model", "tuning", "GPUs", "peak of a GPU", "rollout + scoring + update", "a round", "scaling", "sent by each", "network, s"],
        many,
        MANY,
    ),
    "border": (["tuning", "GPUs", "network of a machine", "scoring: tokens", "update: tokens", "a round"], border, BORDER),
    "failures": (
        ["model", "GPUs", "between failures", "checkpoint", "written in", "best interval", "`ppo.checkpoint_every`", "lost"],
        failures,
        [c for c in MANY if c.words in (FULL, FULL_70) and c.nodes in (1, 4, 32)],
    ),
}


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(name: str) -> str:
    heads, row, cases = TABLES[name]
    return "\n".join([line(heads), "|" + "---|" * len(heads), *(line(row(case)) for case in cases)])


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in TABLES:
        found = table(name)
        print(f"{name}\n{found}\n", flush=True)
        page = re.sub(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", lambda _, t=found: t + "\n", page, flags=re.S)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
