"""Where the time and the memory of a run went, and advice where the figures ask for it. docs/speed.md lists the rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from srppo.report.record import Record, read_run
from srppo.text import clean, duration, number, percent

PHASES = {
    "rollout": "rollouts",
    "score": "scoring",
    "update": "update",
    "evaluate": "evaluations",
    "guard": "guard",
    "checkpoint": "checkpoints",
}
PARTS = {
    "policy": "of it the policy's steps",
    "critic": "of it the critic's steps",
    "comm": "of all: sending to and waiting for other processes",
}
STAGES = {
    "load": "models and data",
    "sft": "SFT",
    "diagnose": "reward card",
    "ppo": "PPO",
    "sft_continued": "continued SFT",
    "evaluate": "evaluation",
    "report": "report",
}
# From here on there is something to say. docs/speed.md gives the reasons.
LEAST_ROUNDS, LEAST_SECONDS = 3, 60.0  # of PPO; less is no ground for advice
ROLLOUT_SHARE, CRITIC_SHARE, WATCHING_SHARE, CHECKPOINT_SHARE = 0.6, 0.35, 0.3, 0.15  # of PPO's time
PADDING_SHARE = 0.3  # of the positions passed
WAITED_SHARE = 0.2  # of the time that threads wanted a core
MEMORY_SHARE = 0.85  # of the machine's


@dataclass(frozen=True)
class Speed:
    """PPO's rounds taken together, those that a profiler slowed down left out, and the run's stages."""

    rounds: int
    seconds: dict[str, float]  # by phase and part
    rates: dict[str, float]  # tokens a second, by phase
    peaks: dict[str, float]  # MiB, by phase
    reserved: dict[str, float]  # MiB of a GPU, by phase; {} without one
    padding: dict[str, float]  # share of positions, by stage
    waited: float | None  # of the time that threads wanted a core, the share they had none
    stages: dict[str, dict[str, Any]]  # seconds, peak_rss_mb

    @property
    def total(self) -> float:
        """Seconds of PPO's phases."""
        return sum(self.seconds.get(name, 0.0) for name in PHASES)

    def share(self, name: str) -> float:
        """Of that, a phase's or part's."""
        return self.seconds.get(name, 0.0) / self.total if self.total else 0.0


def speed_of(record: Record) -> Speed:
    """From metrics.jsonl and elapsed.json."""
    rows = [r for r in record.metrics if r.get("stage") == "ppo" and not r.get("timing/profiled")]
    seconds = {name: _total(rows, f"timing/{name}") for name in (*PHASES, *PARTS)}
    rates = {
        name: tokens / seconds[name]
        for name in ("rollout", "score", "update")
        if seconds[name] and (tokens := _total(rows, f"{name}/tokens_per_second", f"timing/{name}"))
    }
    supervised = {stage: [r for r in record.metrics if r.get("stage") == stage] for stage in ("sft", "sft_continued")}
    for stage, steps in supervised.items():
        if spent := _total(steps, "timing/step"):
            rates[stage] = _total(steps, "tokens_per_second", "timing/step") / spent
    padding = {}
    for stage, given, weight in (*((s, r, "timing/step") for s, r in supervised.items()), ("ppo", rows, "timing/update")):
        if (spent := _total([r for r in given if _number(r.get("padding_share"))], weight)) > 0:
            padding[stage] = _total(given, "padding_share", weight) / spent
    cpu, waited = (_total(rows, f"timing/{name}") for name in ("cpu", "waited"))
    stages = record.elapsed.get("stages")
    return Speed(
        rounds=sum("timing/update" in r for r in rows),
        seconds={name: value for name, value in seconds.items() if value},
        rates=rates,
        peaks=_peaks(rows, ""),
        reserved=_peaks(rows, "_reserved"),
        padding=padding,
        waited=waited / (cpu + waited) if cpu and any("timing/waited" in r for r in rows) else None,
        stages={
            name: cost
            for name, cost in (stages if isinstance(stages, dict) else {}).items()
            if isinstance(cost, dict) and all(_number(cost.get(key)) for key in ("seconds", "peak_rss_mb"))
        },
    )


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _total(rows: list[dict[str, Any]], *keys: str) -> float:
    """Sum over the rows of the product of the keys' values; rows that lack one are left out."""
    total = 0.0
    for row in rows:
        values = [row.get(key) for key in keys]
        if all(_number(v) for v in values):
            product = 1.0
            for value in values:
                product *= float(value or 0.0)
            total += product
    return total


def _peaks(rows: list[dict[str, Any]], ending: str) -> dict[str, float]:
    found = {name: [row[key] for row in rows if _number(row.get(key := f"memory/{name}{ending}"))] for name in PHASES}
    return {name: max(values) for name, values in found.items() if values}


def advice(speed: Speed, config: dict[str, Any], hardware: dict[str, Any]) -> list[str]:
    """A sentence for each rule of docs/speed.md that the figures meet. config, hardware: as in config.yaml and environment.json."""
    if speed.rounds < LEAST_ROUNDS or speed.total < LEAST_SECONDS:
        return []
    return [s for rule in (_waiting, _rollouts, _critic, _watching, _checkpoints, _padding, _memory) for s in rule(speed, config, hardware)]


def _key(config: dict[str, Any], section: str, name: str) -> Any:
    found = config.get(section)
    return found.get(name) if isinstance(found, dict) else None


def _waiting(speed: Speed, config: dict[str, Any], hardware: dict[str, Any]) -> list[str]:
    if speed.waited is None or speed.waited < WAITED_SHARE:
        return []
    threads = hardware.get("threads")
    fewer = "; fewer threads (`threads: 1`) are often far faster then" if _number(threads) and threads > 1 else ""
    return [
        f"For {percent(speed.waited, 0)} of the time that this run wanted a core it had none, as other processes were busy: alone on the "
        f"machine it would be faster than these figures say{fewer}."
    ]


def _rollouts(speed: Speed, config: dict[str, Any], _: dict[str, Any]) -> list[str]:
    width, prompts, samples = (
        _key(config, *key) for key in (("rollout", "batch_size"), ("ppo", "prompts_per_iteration"), ("ppo", "samples_per_prompt"))
    )
    if speed.share("rollout") < ROLLOUT_SHARE or not all(map(_number, (width, prompts, samples))) or width >= prompts * samples:
        return []
    return [
        f"Rollouts take {percent(speed.share('rollout'), 0)} of PPO's time, and rollout.batch_size decodes {width} of a round's "
        f"{prompts * samples} rollouts at once: a wider one costs memory and is usually faster."
    ]


def _critic(speed: Speed, config: dict[str, Any], _: dict[str, Any]) -> list[str]:
    if speed.share("critic") < CRITIC_SHARE:
        return []
    return [
        f"The critic's steps take {percent(speed.share('critic'), 0)} of PPO's time: tuning.critic: least_squares is fitted without any, "
        "and ppo.baseline: group needs no critic (but several samples a prompt, and its advantages are noisier)."
    ]


def _watching(speed: Speed, config: dict[str, Any], _: dict[str, Any]) -> list[str]:
    share = speed.share("evaluate") + speed.share("guard")
    if share < WATCHING_SHARE:
        return []
    name = "evaluation.every" if speed.share("evaluate") > speed.share("guard") else "guard.every"
    return [
        f"Evaluations and the guard's looks take {percent(share, 0)} of PPO's time: a larger {name} "
        f"(now {number(_key(config, *name.split('.')))}) makes them rarer."
    ]


def _checkpoints(speed: Speed, config: dict[str, Any], _: dict[str, Any]) -> list[str]:
    if speed.share("checkpoint") < CHECKPOINT_SHARE:
        return []
    every = number(_key(config, "ppo", "checkpoint_every"))
    return [f"Saving checkpoints takes {percent(speed.share('checkpoint'), 0)} of PPO's time: raise ppo.checkpoint_every (now {every})."]


def _padding(speed: Speed, config: dict[str, Any], _: dict[str, Any]) -> list[str]:
    if speed.padding.get("ppo", 0.0) < PADDING_SHARE:
        return []
    return [
        f"Of all positions that scoring and update passed, {percent(speed.padding['ppo'], 0)} were padding: a smaller "
        f"ppo.micro_batch_tokens (now {number(_key(config, 'ppo', 'micro_batch_tokens'))}) puts rows of like length together."
    ]


def _memory(speed: Speed, config: dict[str, Any], hardware: dict[str, Any]) -> list[str]:
    total = hardware.get("memory_gb")
    if speed.reserved or not speed.peaks or not _number(total) or not total:
        return []
    name = max(speed.peaks, key=lambda n: speed.peaks[n])
    used = speed.peaks[name] * 2**20 / 1e9
    if used < MEMORY_SHARE * float(total):
        return []
    cure = "a smaller rollout.batch_size" if name == "rollout" else "a smaller ppo.micro_batch_tokens, or model.gradient_checkpointing"
    return [f"{PHASES[name][0].upper()}{PHASES[name][1:]} reached {used:.1f} of the machine's {total:.1f} GB of memory: {cure} needs less."]


def gib(mib: float) -> str:
    """1234 as 1.2 GiB, 300 as 300 MiB."""
    return f"{mib / 1024:.1f} GiB" if mib >= 1000 else f"{mib:.0f} MiB"


def speed_view(record: Record) -> dict[str, Any]:
    """What the page shows: {} where the run has no such figures."""
    speed, hardware = speed_of(record), record.environment.get("hardware")
    phases = [
        {
            "name": title,
            "part": name in PARTS,
            "time": duration(speed.seconds[name]),
            "share": percent(speed.share(name), 0),
            "width": f"{100 * speed.share(name):.1f}",
            "rate": f"{speed.rates[name]:,.0f}" if name in speed.rates else "",
            "peak": gib(speed.peaks[name]) if name in speed.peaks else "",
            "reserved": gib(speed.reserved[name]) if name in speed.reserved else "",
        }
        for name, title in _in_order(speed)
    ]
    whole = sum(cost["seconds"] for cost in speed.stages.values()) or 1.0
    stages = [
        {
            "name": STAGES[name],
            "time": duration(cost["seconds"]),
            "share": percent(cost["seconds"] / whole, 0),
            "width": f"{100 * cost['seconds'] / whole:.1f}",
            "rate": f"{speed.rates[name]:,.0f}" if name in speed.rates else "",
            "padding": percent(speed.padding.get(name), 0) if name in speed.padding else "",
            "peak": gib(cost["peak_rss_mb"]),
        }
        for name in STAGES
        if (cost := speed.stages.get(name))
    ]
    if not phases and not stages:
        return {}
    traces = sorted(p.name for p in (record.path / "profile").glob("round-*.json.gz"))
    return {
        "phases": phases,
        "rounds": speed.rounds,
        "stages": stages,
        "gpu": bool(speed.reserved),
        "advice": advice(speed, record.config, hardware if isinstance(hardware, dict) else {}),
        "waited": None if speed.waited is None else percent(speed.waited, 0),
        "traces": [clean(f"profile/{name}") for name in traces],
    }


def _in_order(speed: Speed) -> list[tuple[str, str]]:
    """Phases with their parts behind the update."""
    out = []
    for name, title in PHASES.items():
        if name in speed.seconds:
            out.append((name, title))
            out += [(part, PARTS[part]) for part in ("policy", "critic") if name == "update" and part in speed.seconds]
    return out + [("comm", PARTS["comm"])] * ("comm" in speed.seconds)


def closing_line(run_folder: str | Path) -> str:
    """One line for the end of a run: time by stage and phase, and the peak of the memory; "" where nothing was measured."""
    record = read_run(run_folder)
    speed = speed_of(record)
    stages = sorted(((n, c["seconds"]) for n, c in speed.stages.items() if n in STAGES), key=lambda s: -s[1])
    words = []
    for name, seconds in stages:
        inner = ""
        if name == "ppo" and speed.total:
            shares = ", ".join(f"{PHASES[p]} {percent(speed.share(p), 0)}" for p in PHASES if speed.share(p) >= 0.005)
            inner = f" ({shares})"
        if seconds >= 0.5:
            words.append(f"{STAGES[name]} {duration(seconds)}{inner}")
    if not words:
        return ""
    where, peak = max(((n, c["peak_rss_mb"]) for n, c in speed.stages.items() if n in STAGES), key=lambda s: s[1])
    gpu = f", of the GPU {gib(max(speed.peaks.values()))} in PPO" if speed.reserved and speed.peaks else ""
    return f"time: {', '.join(words)}; peak memory {gib(peak)} ({STAGES[where]}){gpu}"
