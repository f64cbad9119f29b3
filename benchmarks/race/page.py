"""docs/results/speed.md from the result files: targets and whether they are met, then each benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.race.compare import PHASES

Result = dict[str, Any]
# By shape, and whether adapters are tuned: the least speed ratio and the largest memory ratio that are aimed at.
SPEED = {("default", "full"): 1.6, ("smollm2", "full"): 2.0, ("default", "lora"): 2.5, ("smollm2", "lora"): 2.5}
MEMORY = {"full": 1 / 2, "lora": 1 / 3}
FLOOR = 1.25
GPU_SPEED, GPU_MFU, GPU_DECODE = 5.0, 0.45, 0.5
OPTIONS = {"compile": ("`model.compile: true`", None), "least_squares": ("`tuning.critic: least_squares`", "no critic trunk to train")}
SHAPE_NAMES = {"default": "default, 5 M", "smollm2": "SmolLM2-135M's", "tiny": "tiny"}
INTRODUCTION = """\
# Speed and memory

How long a round of PPO takes and what it needs, against TRL on the same machine at equal work. A benchmark writes its figures as JSON
into `benchmarks/results/` and this page from all of them; nothing here is typed by hand.

| command | what |
|---|---|
| `python -m benchmarks.race_trl_ppo` | PPO with a critic against TRL 1.12.0's PPOTrainer, the last TRL had |
| `python -m benchmarks.race_trl_rloo` | critic-free, against today's TRL's RLOOTrainer |
| `python -m benchmarks.lab_race` | the embedded world: seconds to the SFT's accuracy + 10 points |
| `python -m benchmarks.growth` | time and memory over response length, batch, vocabulary and model size |
| `python -m benchmarks.gpu` | on a machine with a GPU: correctness, tokens a second, shares of the device's limits |
"""
HOW = """\
Both sides: the same weights, prompts (the same token ids), reward, KL coefficient, learning rate, λ, epochs and minibatches, float32,
one thread, no gradient clipping, each in a process of its own, taking turns. A round is timed from the end of the one before, and a
process's first is not counted; figures are medians. Memory is the peak of resident memory while rounds run, less what is resident once
a tiny run has loaded all libraries. TRL is set up as its user would do it: a reference, and a reward model with two models of its
own; in LoRA its `peft_config` gives the policy an adapter and the critic is trained whole.
Ours trains a critic with a trunk too; `tuning.critic: least_squares` has rows of its own. `TRL at its thriftiest` is the best we made
of it: frozen models shared, the reward's LM head on response positions only, an adapter for the critic too. Ratios above 1 in speed and
below 1 in memory are in our favour. Processor time is told beside wall time, as other work on a machine lengthens only the latter.
Equal work means: the same responses and policy steps, generated tokens within 2 %, weights moved within 1 %, mean scores within
four standard errors.

The floor is the least arithmetic that a round needs (products of matrices only, real tokens only, the LM head on response positions,
no weight gradients of LoRA's base: `benchmarks/race/floor.py`) over the rate at which this machine multiplied matrices in the same
run: that of large square products (peak), or of the model's own products (own rates), both in processor seconds."""


def speed_page(found: dict[str, Result]) -> str:
    """found: results by name; those that are missing are named as not run."""
    lines = [INTRODUCTION, "## Targets", "", *targets(found), ""]
    sections = (("race_trl_ppo", ppo), ("race_trl_rloo", rloo), ("lab_race", lab), ("growth", growth), ("gpu", gpu))
    for name, section in sections:
        if name in found:
            lines += [*section(found[name]), ""]
    missing = [f"`benchmarks.{name}`" for name, _ in sections if name not in found]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    return "\n".join(lines)


def targets(found: dict[str, Result]) -> list[str]:
    """The table of targets."""
    lines = ["| target | aimed at | measured | met |", "|---|---|---|---|"]
    for what, aim, value, met in _targets(found):
        lines.append(f"| {what} | {aim} | {value} | {'yes' if met else 'no'} |")
    return lines if len(lines) > 2 else ["No results yet."]


def _targets(found: dict[str, Result]) -> Iterator[tuple[str, str, str, bool]]:
    for row in found.get("race_trl_ppo", {}).get("rows", []):
        where = f"{SHAPE_NAMES[row['name']]} shape, {row['tuning']}"
        speed, memory = SPEED.get((row["name"], row["tuning"])), MEMORY[row["tuning"]]
        if speed is None:
            continue
        yield f"{where}: times as fast as TRL's PPO", f"≥ {speed}", f"{row['speed_ratio']:.2f}", row["speed_ratio"] >= speed
        yield f"{where}: memory over TRL's", f"≤ {memory:.2f}", f"{row['memory_ratio']:.2f}", row["memory_ratio"] <= memory
        for option, own in _options(row):
            told = f"{where}, {OPTIONS[option][0]}"
            yield f"{told}: times as fast", f"≥ {speed}", f"{own['speed_ratio']:.2f}", own["speed_ratio"] >= speed
            yield f"{told}: memory", f"≤ {memory:.2f}", f"{own['memory_ratio']:.2f}", own["memory_ratio"] <= memory
            over = own["over_floor_at_peak"]
            yield f"{told}: time over its floor at peak", f"≤ {FLOOR}", f"{over:.2f}", over <= FLOOR
        over = row["over_floor_at_peak"]
        yield f"{where}: time over the floor at peak", f"≤ {FLOOR}", f"{over:.2f}", over <= FLOOR
    for row in found.get("gpu", {}).get("rows", []):
        where = f"GPU, {row['shape']['name']}, {row['tuning']}"
        if "speed_ratio" in row:
            yield f"{where}: times as fast as TRL's PPO", f"≥ {GPU_SPEED}", f"{row['speed_ratio']:.2f}", row["speed_ratio"] >= GPU_SPEED
        if "ours" in row:
            mfu, decode = row["ours"]["update_mfu"], row["ours"]["decode_share"]
            yield f"{where}: update's share of the product peak", f"≥ {GPU_MFU:.0%}", f"{mfu:.1%}", mfu >= GPU_MFU
            yield f"{where}: decoding's share of the bandwidth limit", f"≥ {GPU_DECODE:.0%}", f"{decode:.1%}", decode >= GPU_DECODE


def ppo(result: Result) -> list[str]:
    return ["## PPO against TRL's PPOTrainer", "", HOW, "", *race(result)]


def rloo(result: Result) -> list[str]:
    version = result["environment"]["packages"]["trl"]
    return [
        f"## Critic-free against RLOOTrainer (TRL {version})",
        "",
        "As above, with four samples a prompt and no critic on either side (ours: `ppo.baseline: group`); a batch of responses is used for",
        "the same number of steps (RLOOTrainer's `steps_per_generation` and `num_iterations`), advantages normalised on both.",
        "RLOOTrainer clips one ratio a response, ours one a token.",
        "",
        *race(result),
    ]


def race(result: Result) -> list[str]:
    """Tables of a race's rows."""
    rows = result["rows"]
    lines = [
        "| shape | tuning | ours, s a round | TRL | **times as fast** | by processor time | ours, MiB | TRL | **ratio** | equal work |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {SHAPE_NAMES[row['name']]} | {row['tuning']} | {row['ours']['seconds']:.2f}"
        lines.append(f"{start} | {_against(row, row['ours'], row['peer'])} | {_equal(row)} |")
        for peer in row["other_peers"].values():
            lines.append(f"{start} | {_against(peer, row['ours'], peer)} | TRL at its thriftiest |")
        for option, own in _options(row):
            mine = f"| {SHAPE_NAMES[row['name']]} | {row['tuning']}, {OPTIONS[option][0]} | {own['seconds']:.2f}"
            lines.append(f"{mine} | {_against(own, own, row['peer'])} | {OPTIONS[option][1] or _equal(row)} |")
    lines += [
        "",
        "By phase, seconds of a round, ours / TRL, and the floor of ours:",
        "",
        "| shape | tuning | rollout | score | update | GFLOP needed | peak, GFLOP/s | time over floor at peak | at own rates |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['ours']['phases'][name]:.2f} / {row['peer']['phases'][name]:.2f}" for name in PHASES]
        floor = row["floor"]
        lines.append(
            f"| {SHAPE_NAMES[row['name']]} | {row['tuning']} | {' | '.join(cells)} | {sum(floor['gflop'].values()):.0f} | "
            f"{floor['peak_gflop_per_second']:.0f} | {row['over_floor_at_peak']:.2f} | {row['over_floor_at_own_rates']:.2f} |"
        )
    lines += [
        "",
        "| shape | tuning | work of a process | responses | response tokens | policy steps | weights moved | mean score, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        work, shape = row["equal_work"], row["shape"]
        counts = [f"{work[k][0]:.0f} / {work[k][1]:.0f}" for k in ("responses", "response_tokens", "policy_steps")]
        moved = " / ".join(f"{value:.4g}" for value in work["weights_moved"])
        score = f"{work['mean_score'][0]:.4f} / {work['mean_score'][1]:.4f} (± {work['score_standard_error']:.4f})"
        what = f"{row['updates']} rounds of {shape['batch']} × ({shape['prompt']} + {shape['response']})"
        what += f", {shape['epochs']} × {shape['minibatches']} steps"
        what += f"; {row['turns']} of a side, {row['turns'] * (row['updates'] - 1)} rounds counted"
        lines.append(f"| {SHAPE_NAMES[row['name']]} | {row['tuning']} | {what} | {' | '.join(counts)} | {moved} | {score} |")
    return [*lines, "", _where(result, rows)]


def _options(row: Result) -> list[tuple[str, Result]]:
    """Our side with options, those that there still are."""
    return [(option, own) for option, own in row.get("our_options", {}).items() if option in OPTIONS and "over_floor_at_peak" in own]


def _equal(row: Result) -> str:
    work = row["equal_work"]
    if work["equal"]:
        return "yes"
    same = all(work[key][0] == work[key][1] for key in ("responses", "policy_steps"))
    return "all but the critic, which TRL trains whole" if same and row["tuning"] == "lora" else "**no**"


def _against(ratios: Result, mine: Result, other: Result) -> str:
    """The cells that compare with one peer."""
    speed = f"{other['seconds']:.2f} | **{ratios['speed_ratio']:.2f}** | {ratios['cpu_speed_ratio']:.2f}"
    return f"{speed} | {mine['memory_mb']:.0f} | {other['memory_mb']:.0f} | **{ratios['memory_ratio']:.2f}**"


def lab(result: Result) -> list[str]:
    total, rows = result["summary"], result["rows"]
    lines = [
        f"## Seconds to the SFT's accuracy + {100 * result['gain']:.0f} points",
        "",
        "The embedded world, sampled accuracy on the six families without demonstrations; ours against TRL 1.12.0's PPOTrainer on",
        "the same SFT model, prompts, batch, epochs, minibatches, learning rates, KL coefficient and λ. Evaluation, by one function on",
        f"the same words and random numbers every {result['every']} rounds, is outside both clocks. What the two do not share stays each",
        "one's own: ours clips gradients at norm 1, begins with a round for the critic alone and measures values in units of the first",
        "round's returns.",
        "",
        "| seed | SFT | target | ours: seconds (round) | TRL: seconds (round) | ratio | ours, s a round | TRL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for side in ("ours", "trl"):
            there = row[side]["reached"]
            cells.append(f"{there['seconds']:.1f} ({there['round']})" if there else f"not in {sum(row[side]['round_seconds']):.0f} s")
        both = row["ours"]["reached"] and row["trl"]["reached"]
        ratio = f"{row['trl']['reached']['seconds'] / row['ours']['reached']['seconds']:.2f}" if both else "–"
        pace = " | ".join(f"{row[side]['seconds_per_round']:.2f}" for side in ("ours", "trl"))
        start = f"{100 * row['sft']['without_demonstrations']:.1f} | {100 * row['target']:.1f}"
        lines.append(f"| {row['seed']} | {start} | {' | '.join(cells)} | {ratio} | {pace} |")
    words = [f"Reached by ours on {total['ours']['reached']} of {total['seeds']} seeds, by TRL on {total['trl']['reached']}."]
    if "time_ratio" in total:
        words.append(
            f"TRL needed {_interval(total['time_ratio'])} times as long (geometric mean of the seeds on which both arrived, 95 % interval)."
        )
    words.append(f"A round takes TRL {_interval(total['round_time_ratio'])} times as long.")
    return [*lines, "", " ".join(words), "", _where(result, rows)]


def growth(result: Result) -> list[str]:
    shape = result["shape"]
    model = shape["model"]
    lines = [
        "## How a round grows",
        "",
        f"Full tuning; what is not varied: {model['layers']} layers of {model['hidden']}, vocabulary {model['vocab']}, {shape['batch']} ×",
        f"({shape['prompt']} + {shape['response']}) tokens, {shape['epochs']} epochs of {shape['minibatches']} minibatches. Time is",
        "processor seconds of a round, memory the peak beyond the libraries; y = a·x^b fitted to the logarithms, b ± its standard error.",
        "",
        "| over | points | seconds | exponent | MiB | exponent |",
        "|---|---|---|---|---|---|",
    ]
    for axis in result["axes"].values():
        points, fits = axis["points"], axis["fits"]

        def spread(key: str, points: list[Result] = points) -> str:
            return ", ".join(f"{p[key]:.3g}" for p in points)

        def exponent(key: str, fits: Result = fits) -> str:
            return f"{fits[key]['exponent']:.2f} ± {fits[key]['standard_error']:.2f}"

        x = ", ".join(f"{p['x']:,.0f}" for p in points)
        cells = [f"{spread(key)} | {exponent(key)}" for key in ("cpu_seconds", "memory_mb")]
        lines.append(f"| {axis['title']} | {x} | {' | '.join(cells)} |")
    return [*lines, "", "![time and memory of a round over four axes](speed/growth.png)", "", _where(result, [])]


def gpu(result: Result) -> list[str]:
    checks = result["checks"]
    lines = [
        f"## On a GPU: {checks['device']}",
        "",
        "Log-probabilities, nats a token, against float32 on the CPU (the engine's against the scorer's on the device):",
        "",
        "| what | mean difference | largest | allowed | right |",
        "|---|---|---|---|---|",
    ]
    for name, gap in checks["correctness"].items():
        allowed = " / ".join(f"{value:g}" for value in gap["allowed"])
        lines.append(f"| {name} | {gap['mean']:.2g} | {gap['largest']:.2g} | {allowed} | {'yes' if gap['right'] else '**no**'} |")
    peak, bandwidth = checks["speeds"]["matmul_flop_per_second"] / 1e12, checks["speeds"]["bytes_per_second"] / 1e9
    lines += [
        "",
        f"Measured: {peak:.4g} TFLOP/s in square products, {bandwidth:.4g} GB/s in copies. Shares: of that peak by the update's necessary",
        "arithmetic; of the tokens a second that reading weights and cache once a step would allow, by the rollouts.",
        "",
        "| shape | tuning | side | s a round | rollout, tokens/s | score, s | update, s | update's share | rollout's share | GPU, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for side in ("ours", "peer"):
            start = f"| {row['shape']['name']} | {row['tuning']} |"
            lines.append(f"{start} {_device_row(row[side]) if side in row else _absent(row, side)} |")
    equal = [f"{row['shape']['name']} {row['tuning']}: {_equal(row)}" for row in result["rows"] if "equal_work" in row]
    if equal:
        lines += ["", f"Equal work, as told above the first race: {'; '.join(equal)}."]
    return [*lines, "", _where(result, [])]


def _device_row(side: Result) -> str:
    """A side's cells on the device."""
    phases, tokens = side["phases"], side["response_tokens_per_second"] * side["seconds"]
    memory = f"{side['gpu_peak_mb'] / 1024:.1f}" if side.get("gpu_peak_mb") else "–"
    times = f"{side['seconds']:.2f} | {tokens / phases['rollout']:.0f} | {phases['score']:.2f} | {phases['update']:.2f}"
    return f"{side['system']} | {times} | {side['update_mfu']:.1%} | {side['decode_share']:.1%} | {memory}"


def _absent(row: Result, side: str) -> str:
    """Why a side has no figures: the end of what it said."""
    reason = row.get("ours_failed" if side == "ours" else "trl_ppo_failed") or row.get("failed") or "not reached in time"
    return f"{side}: {' '.join(reason.split())[-120:].replace('|', '/')} | | | | | | |"


def _interval(x: dict[str, float]) -> str:
    return f"{x['mean']:.2f}" + (f" ({x['low']:.2f} to {x['high']:.2f})" if "low" in x else "")


def _quiet(load: float) -> str:
    return "(quiet)" if load < 1 else "(not quiet: wall times are too long, compare processor time)"


def _where(result: Result, rows: list[Result]) -> str:
    """Machine, versions, date, and how busy the machine was."""
    hardware, packages = result["environment"]["hardware"], result["environment"]["packages"]
    loads = [load for row in rows if (load := row.get("load_average_before")) is not None]
    busy = f"; load average before the runs {min(loads):.1f} to {max(loads):.1f} {_quiet(max(loads))}" if loads else ""
    versions = ", ".join(f"{name} {packages[name]}" for name in ("srppo", "torch", "transformers", "trl") if name in packages)
    memory = f", {hardware['memory_gb']:.0f} GB" if "memory_gb" in hardware else ""
    return f"{result['date'][:10]}, {hardware['cpu']}, {hardware['cores']} cores{memory}; {versions}{busy}."
