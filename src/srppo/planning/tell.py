"""The plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from srppo.planning.memory import Phase
from srppo.planning.plan import MARGIN, Plan
from srppo.planning.remedy import Remedy
from srppo.text import duration

if TYPE_CHECKING:
    from srppo.planning.run import Planned

COLUMNS = ("weights", "gradients", "optimizer", "activations", "kv cache", "other")
SHOWN = {"gradients": "grads", "optimizer": "AdamW", "activations": "activ.", "kv cache": "KV"}  # 80 columns


def size(count: float) -> str:
    """Bytes as MB (1e6) or GB (1e9)."""
    return f"{count / 1e9:.1f} GB" if count >= 9.95e8 else f"{count / 1e6:.0f} MB"


def verdict(plan: Plan, remedy: Remedy | None) -> list[str]:
    """What a reader wants at a glance: fits or not, and what to do."""
    m, worst = plan.machine, plan.worst
    each = "" if m.count == 1 else "a GPU" if m.gpu else "a process"
    need = f"{size(plan.need)} of {size(m.memory)}{' ' + each if each else ''} at the worst moment ({worst.name})"
    if plan.fits:
        return [f"FITS: {need}."]
    lines = [f"DOES NOT FIT: {need}; {100 * MARGIN:.0f} % of it may be filled."]
    if m.gpu and m.host_memory is not None and plan.host_need > MARGIN * m.host_memory:
        lines = [f"DOES NOT FIT: the CPU's memory: {size(plan.host_need)} of {size(m.host_memory)}, for {beside_gpus(plan)}."]
    if "vllm" in plan.over:
        lines = [
            f"DOES NOT FIT: vLLM's share is {size(plan.vllm_takes)}, its weights and one longest sequence take {size(plan.vllm_needs)}: "
            "raise rollout.memory, or use rollout.engine: torch."
        ]
    if remedy is None:
        return [*lines, "Nothing that srppo can change makes it fit: take a smaller model, shorter responses, or a larger machine."]
    return [*lines, f"With these settings it does ({size(remedy.plan.need)}, {remedy_time(plan, remedy)}):"]


def beside_gpus(plan: Plan) -> str:
    """What lies in the CPU's memory."""
    if plan.processes.size == 1:
        return "checkpoints and what is off-loaded"
    return "loading, checkpoints, saving a model, and what is off-loaded, of all processes of a machine"


def enough_in_words(enough: tuple[int, int]) -> str:
    """With how many GPUs the recipe fits as it is."""
    gpus, nodes = enough
    return f"As it is it fits on {gpus * nodes} of these GPUs" + (f" ({nodes} machines of {gpus})." if nodes > 1 else ".")


def remedy_time(plan: Plan, remedy: Remedy) -> str:
    return f"about {duration(remedy.plan.times.round)} a round instead of {duration(plan.times.round)}"


def fragment(changes: dict[str, Any]) -> str:
    """Dotted keys as a recipe fragment."""
    import yaml

    tree: dict[str, Any] = {}
    for key, value in changes.items():
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return yaml.safe_dump(tree, sort_keys=False)


def memory_rows(plan: Plan) -> list[list[str]]:
    """A row a phase: what each purpose takes of the device, and the sum with the libraries'."""
    return [[phase.name, *_cells(phase, host=False), size(phase.total() + plan.machine.libraries)] for phase in plan.phases]


def _cells(phase: Phase, host: bool) -> list[str]:
    sums = dict.fromkeys(COLUMNS, 0)
    for item in phase.items:
        if item.host == host:
            sums[item.purpose if item.purpose in sums else "other"] += item.bytes
    return [size(v) if v else "" for v in sums.values()]


def role_rows(plan: Plan) -> list[list[str]]:
    """The worst phase by role and purpose."""
    return [[i.role, i.purpose, "CPU" if i.host else "", size(i.bytes)] for i in plan.worst.items if i.bytes]


def time_rows(plan: Plan) -> list[list[str]]:
    t = plan.times

    def sent(phase: str) -> str:
        return f"{duration_of(t.network[phase])} on the network" if t.network.get(phase) else ""

    def joined(*words: str) -> str:
        return "; ".join(w for w in words if w)

    rows = [["rollout", duration_of(t.rollout), joined(f"{t.sampled / max(t.rollout, 1e-9):,.0f} response tokens/s", sent("rollout"))]]
    rows.append(["scoring", duration_of(t.score), joined(f"{t.tokens:,} tokens, prompts included", sent("scoring"))])
    rows.append(["update", duration_of(t.update), sent("update")])
    rows.append(["a round", duration_of(t.round), f"{plan.flops / 1e12:,.1f} TFLOP"])
    if t.sft is not None:
        rows.append(["SFT", duration_of(t.sft), joined("all of it", sent("sft"))])
    rows.append(["SFT and PPO", duration_of(t.total), f"{t.rounds} rounds; evaluations, card and baselines on top"])
    return rows


def network_rows(plan: Plan) -> list[list[str]]:
    """A row a flow: what each process sends in a round, in how many collectives, and how long that takes."""
    return [
        [f.phase, f.what, f.collective, size(f.bytes), f"{f.calls:,}", duration_of(f.seconds) if f.seconds else ""] for f in plan.traffic
    ]


def network_words(plan: Plan) -> list[str]:
    """What follows from the flows: where communication is hidden, how long a run goes without a failure."""
    r, lines = plan.reliability, [f"In a round each process sends {size(plan.sent)}. {plan.machine.links.name}."]
    for phase, h in plan.hidden.items():
        if h.needed > 0:
            how = "hidden behind computing" if plan.machine.gpu else "shorter than computing"
            lines.append(f"In {phase} it is {how} from {h.needed:,.0f} tokens a micro-batch and process on; there are {h.there:,.0f}.")
    every = max(1, round(r.interval / plan.times.round)) if plan.times.round else 1
    lines.append(
        f"One unexpected stop in {duration(r.between_failures)} is to be expected at the rate of arXiv 2407.21783; a checkpoint has "
        f"{size(r.checkpoint_bytes)}, and one every {duration(r.interval)} (ppo.checkpoint_every: {every}) loses least, "
        f"{100 * r.lost:.1f} % of the time."
    )
    return lines


def duration_of(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def tell(planned: Planned, stream: TextIO) -> None:
    """Print the plan, the verdict first."""
    from rich.console import Console
    from rich.text import Text

    plan, remedy = planned.plan, planned.remedy
    terminal = stream.isatty()
    console = Console(file=stream, highlight=False, no_color=not terminal, width=None if terminal else 100)
    lines = verdict(plan, remedy)
    console.print(Text(lines[0], style="bold green" if plan.fits else "bold red"))
    for line in lines[1:]:
        console.print(Text(line))
    if not plan.fits and remedy is not None:
        console.print(Text("\n" + "\n".join("    " + line for line in fragment(remedy.changes).splitlines()) + "\n"))
    if planned.enough is not None:
        console.print(Text(enough_in_words(planned.enough)))
    m, lengths, several = plan.machine, plan.lengths, plan.processes.size > 1
    adapter = f", {plan.adapter / 1e6:.1f} million an adapter" if plan.adapter else ""
    console.print(Text(f"model: {plan.model}, {plan.parameters / 1e6:,.1f} million parameters{adapter}"))
    rates = f"{m.flops / 1e12:.3g} TFLOP/s, {m.bandwidth / 1e9:.3g} GB/s {'measured' if m.measured else 'assumed attained'}"
    console.print(Text(f"machine: {counted(plan)}{m.name}, {size(m.memory)}; {rates}"))
    console.print(
        Text(
            f"lengths: from {planned.lengths_from}: prompts to {lengths.max_prompt} tokens, mean {lengths.mean_prompt:.0f}; "
            f"responses to {lengths.max_response}, mean {lengths.mean_response:.0f}"
        )
    )
    console.print()
    heads = [SHOWN.get(c, c) for c in COLUMNS]
    each = "" if not several else ", a GPU" if m.gpu else ", a process"
    table(console, "Memory by phase" + each, ["", *heads, "sum"], memory_rows(plan))
    console.print(
        Text(f"Each sum holds {size(m.libraries)} of the libraries' own ({'measured here' if m.measured and not m.gpu else 'assumed'}).")
    )
    if m.gpu and plan.host_need:
        console.print(Text(f"Of the CPU's memory {size(plan.host_need)} at the worst, for {beside_gpus(plan)}."))
    console.print()
    table(console, f"Worst moment: {plan.worst.name}", ["role", "purpose", "", "size"], role_rows(plan))
    console.print()
    table(console, "Time, a forecast", ["", "", ""], time_rows(plan))
    if several:
        console.print()
        table(console, "Network, what each process sends in a round", ["", "what", "how", "sum", "calls", "time"], network_rows(plan))
        for line in network_words(plan):
            console.print(Text(line))


def counted(plan: Plan) -> str:
    """How many of the machine's GPUs or processes, and how the weights are spread."""
    m, p = plan.machine, plan.processes
    if p.size == 1:
        return ""
    many = f"{m.nodes} × {m.local} × " if m.nodes > 1 else f"{p.size} {'' if m.gpu else 'processes '}× "
    copies = "" if p.replicas == 1 else f"{p.replicas} copies of the weights, each on {p.shards}: "
    return copies + many


def table(console: Any, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column to the left, the others to the right; empty columns are left out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    used = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
    head = any(columns[i] for i in used)
    out = Table(
        title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_header=head
    )
    for i in used:
        out.add_column(Text(columns[i]), justify="left" if i == 0 or columns[i] in ("purpose", "what", "how", "") else "right")
    for row in rows:
        out.add_row(*(Text(row[i]) for i in used))
    console.print(out)
