"""Two sides' answers made into one row: times, memory, the floor, and whether the work was equal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.race.floor import Flops, round_flops, seconds
from benchmarks.race.materials import prompt_ids
from benchmarks.race.shapes import Shape

TRUNKLESS = ("least_squares",)  # of our options: no critic's pass, so none in the floor
Answer = dict[str, Any]
PHASES = ("rollout", "score", "update")
SIGMAS = 4.0  # by which the sides' mean scores may differ


def counted(answers: Sequence[Answer], key: str) -> list[float]:
    """A figure of every round but each process's first."""
    return [value for answer in answers for value in answer[key][1:]]


def phase(answers: Sequence[Answer], name: str) -> float:
    """Median seconds of a phase."""
    return statistics.median(value for answer in answers for value in answer["phases"][name][1:])


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """One side over its turns: medians of the counted rounds; memory is the least of the turns, as noise only adds."""
    times = counted(answers, "seconds")
    out = {
        "system": answers[0]["system"],
        "seconds": statistics.median(times),
        "seconds_each": [[round(s, 3) for s in answer["seconds"]] for answer in answers],
        "cpu_seconds": statistics.median(counted(answers, "cpu_seconds")),
        "phases": {name: phase(answers, name) for name in PHASES},
        "response_tokens_per_second": sum(counted(answers, "response_tokens")) / sum(times),
        "memory_mb": min(answer["rss_peak_mb"] - answer["rss_before_mb"] for answer in answers),
        "libraries_mb": statistics.fmean(answer["rss_before_mb"] for answer in answers),
        "scores": [round(s, 4) for answer in answers for s in answer["scores"]],
        "kl": [round(s, 4) for answer in answers for s in answer["kl"]],
    }
    if "rss_peak_with_saving_mb" in answers[0]:
        out["memory_with_saving_mb"] = min(a["rss_peak_with_saving_mb"] - a["rss_before_mb"] for a in answers)
    return out


def equal_work(shape: Shape, updates: int, ours: Sequence[Answer], theirs: Sequence[Answer]) -> dict[str, Any]:
    """Counts of both sides and whether they agree: responses, generated tokens (2 %), weights moved (1 %), mean scores (4 sigma).

    Optimizer steps are given as policy steps; ours has an optimizer a role, TRL one for both.
    """

    def total(answers: Sequence[Answer], key: str) -> float:
        return statistics.fmean(sum(a[key]) if isinstance(a[key], list) else a[key] for a in answers)

    out: dict[str, Any] = {key: [total(ours, key), total(theirs, key)] for key in ("responses", "response_tokens", "weights_moved")}
    roles = 2 if shape.samples == 1 else 1
    out["policy_steps"] = [total(ours, "optimizer_steps") / roles, total(theirs, "optimizer_steps")]
    spread = statistics.fmean(s for a in ours for s in a["scores_std"])
    score = [statistics.fmean(s for a in answers for s in a["scores"]) for answers in (ours, theirs)]
    n = shape.batch * updates
    out["mean_score"], out["score_standard_error"] = score, spread * math.sqrt(1 / (n * len(ours)) + 1 / (n * len(theirs)))
    out["equal"] = (
        out["responses"][0] == out["responses"][1] == n
        and out["policy_steps"][0] == out["policy_steps"][1] == updates * shape.epochs * shape.minibatches
        and math.isclose(*out["response_tokens"], rel_tol=0.02)
        and math.isclose(*out["weights_moved"], rel_tol=0.01)
        and abs(score[0] - score[1]) <= SIGMAS * out["score_standard_error"]
    )
    return out


def floor_of(shape: Shape, updates: int, tuning: str, response_tokens: float, rates: dict[str, Any], critic: bool = True) -> dict[str, Any]:
    """Necessary operations of a mean round, and the seconds they take at the peak rate and at the rates of the model's own products."""
    lengths = [len(ids) for ids in prompt_ids(shape, shape.batch * updates // shape.samples)]
    mean = max(1, round(response_tokens / (shape.batch * updates)))
    whole = round_flops(shape, lengths, mean, tuning, critic)
    own = Flops(*rates["kinds"])
    share = shape.samples / updates
    flops = {name: work.times(share) for name, work in whole.items()}
    return {
        "gflop": {name: work.total / 1e9 for name, work in flops.items()},
        "peak_gflop_per_second": rates["peak"] / 1e9,
        "own_gflop_per_second": {kind: rate / 1e9 for kind, rate in zip(Flops.__dataclass_fields__, own.parts())},
        "seconds_at_peak": {name: work.total / rates["peak"] for name, work in flops.items()},
        "seconds_at_own_rates": {name: seconds(work, own) for name, work in flops.items()},
    }


def row(
    shape: Shape,
    tuning: str,
    updates: int,
    ours: Sequence[Answer],
    theirs: dict[str, Sequence[Answer]],
    rates: dict[str, Any],
    options: dict[str, Sequence[Answer]] | None = None,
) -> dict[str, Any]:
    """One line of a race. The first of `theirs` is the rival; the others, and ours with options, are told beside it."""
    mine, peers = summary(ours), {kind: summary(answers) for kind, answers in theirs.items()}
    first = next(iter(theirs))
    tokens = statistics.fmean(sum(a["response_tokens"]) for a in ours)
    floor = floor_of(shape, updates, tuning, tokens, rates, critic=shape.samples == 1)

    def against(own: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
        return {
            "speed_ratio": peer["seconds"] / own["seconds"],
            "cpu_speed_ratio": peer["cpu_seconds"] / own["cpu_seconds"],
            "memory_ratio": own["memory_mb"] / peer["memory_mb"],
            "phase_ratios": {name: peer["phases"][name] / own["phases"][name] for name in PHASES},
        }

    ratios = {kind: against(mine, peer) for kind, peer in peers.items()}
    variants = {option: summary(answers) for option, answers in (options or {}).items()}

    def over_floor(own: dict[str, Any], least: dict[str, Any]) -> dict[str, float]:
        return {f"over_floor_at_{kind}": own["cpu_seconds"] / sum(least[f"seconds_at_{kind}"].values()) for kind in ("peak", "own_rates")}

    floors = {
        option: floor_of(shape, updates, tuning, tokens, rates, critic=False) if option in TRUNKLESS else floor for option in variants
    }
    return {
        "shape": shape.to_dict(),
        "tuning": tuning,
        "updates": updates,
        "turns": len(ours),
        **ratios[first],
        "ours": mine,
        "peer": peers[first],
        "other_peers": {kind: peers[kind] | ratios[kind] for kind in list(peers)[1:]},
        "our_options": {option: own | against(own, peers[first]) | over_floor(own, floors[option]) for option, own in variants.items()},
        "equal_work": equal_work(shape, updates, ours, theirs[first]),
        "equal_work_thrifty": equal_work(shape, updates, ours, theirs[f"{tuning}_thrifty"]) if f"{tuning}_thrifty" in theirs else None,
        "floor": floor,
        **over_floor(mine, floor),
    }


def told(answer: Answer) -> str:
    """One side's answer in a line, for the log."""
    times = ", ".join(f"{s:.2f}" for s in answer["seconds"])
    phases = ", ".join(f"{name} {statistics.median(v):.2f}" for name, v in answer["phases"].items())
    return f"{times} s a round ({phases}), {answer['rss_peak_mb'] - answer['rss_before_mb']:.0f} MiB beyond the libraries"
